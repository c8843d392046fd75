// The CUDA kernels of rows of logits against the float64 formulas of csrc/softmax_rows.h, in every residence:
// registers, shared memory, clusters of 2, 4 and 8 blocks, streamed. Buffers end where the rows end, so that
// AddressSanitizer sees one element too many; rows start at any element.
#include <algorithm>
#include <memory>
#include <random>
#include <vector>

#include "../../csrc/cuda/softmax_rows_arguments.h"
#include "../../csrc/cuda/softmax_rows_plan.h"
#include "schedules.h"

using namespace ava;

// [n_rows, stride] elements that begin `shift` elements behind a 16-byte boundary and end with the last row
template <class Element>
struct Rows {
  Rows(int n_rows, int n_columns, int stride, int shift) : stride(stride) {
    size = shift + size_t(n_rows - 1) * stride + n_columns;
    memory.reset(static_cast<Element*>(operator new[](size * sizeof(Element), std::align_val_t(16))));
    data = memory.get() + shift;
  }
  RowLayout layout(int n_rows) const { return {1, {n_rows}, {stride}}; }
  struct Free {
    void operator()(Element* p) const { operator delete[](p, std::align_val_t(16)); }
  };
  int stride;
  size_t size;
  std::unique_ptr<Element, Free> memory;
  Element* data;
};

struct Shape {
  int n_columns, padding, extra_stride, shift, gradient_shift;
  bool in_place;
};

constexpr int kRows = 5, kCandidates = 4, kIgnored = 3;  // row 3 does not count

struct Problem {
  Shape shape{};
  int flags = 0;
  RowOptions<float> options{0.8f, 0.1f, 0.75f, 1.5f, 0.01f, 0.2f, 12.f, 0.7f};
  std::vector<std::vector<float>> logits;
  std::vector<int64_t> targets;
  std::vector<int32_t> ids;
  std::vector<float> weights, row_weights;
};

template <class Element>
Problem make_problem(const Shape& shape, int flags, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal(0, 3);
  const int vocab_size = shape.n_columns - shape.padding;
  const auto column = [&] { return int32_t(random() % vocab_size); };
  Problem problem;
  problem.shape = shape;
  problem.flags = flags;
  for (int row = 0; row < kRows; ++row) {
    std::vector<float> logits(vocab_size);
    for (float& x : logits)
      x = to_float(from_float<Element>(random() % 9 == 0 && row % 2 ? -INFINITY : normal(random)));
    const int32_t peak = column(), target = row == 2 ? peak : column();
    logits[peak] = to_float(from_float<Element>(row == 1 ? 40.f : 9.f));
    if (logits[target] == -INFINITY) logits[target] = 0;
    problem.logits.push_back(logits);
    problem.targets.push_back(row == kIgnored ? -100 : target);
    const int32_t twice = column();
    if (flags & kSoftTargets && logits[twice] == -INFINITY) problem.logits.back()[twice] = 0;  // whose term is inf
    for (const int32_t id : {peak, -1, twice, twice}) problem.ids.push_back(id);
    for (int k = 0; k < kCandidates; ++k) problem.weights.push_back(0.5f + float(k));
    problem.row_weights.push_back(0.25f + float(row));
  }
  return problem;
}

struct Expected {
  double loss = 0;
  std::vector<double> gradient;
};
Expected expected_row(const Problem& problem, int row_index) {
  const std::vector<float>& logits = problem.logits[row_index];
  const int vocab_size = int(logits.size());
  const int64_t target = problem.targets[row_index];
  Expected expected{0, std::vector<double>(vocab_size, 0)};
  if (target < 0) return expected;
  const RowOptions<float>& o = problem.options;
  const RowOptions<double> options{o.temperature,   o.label_smoothing,           o.focal_alpha, o.focal_gamma,
                                   o.z_loss_weight, o.confidence_penalty_weight, o.softcap,     o.reweighting_exponent};
  const bool is_capped = problem.flags & kSoftcap;
  const auto capped = [&](double x) {
    return is_capped && x > -INFINITY ? options.softcap * std::tanh(x / options.softcap) : x;
  };
  RowStatistics<double> row = empty_statistics<double>();
  for (int j = 0; j < vocab_size; ++j) row = update(row, capped(logits[j]), j, 1 / options.temperature);
  const auto u_of = [&](int j) { return (capped(logits[j]) - row.max) / options.temperature; };
  const auto p_of = [&](int j) { return std::exp(u_of(j)) / (1 + row.rest); };
  const int argmax = int(row.argmax);
  const double target_weight = problem.flags & kTargetWeights ? double(problem.weights[row_index * kCandidates]) : 1;
  const RowEvaluation<double> evaluation =
      evaluate(row, options, problem.flags, target == argmax, u_of(int(target)), target_weight);
  expected.loss = evaluation.terms[kMainLoss] + evaluation.terms[kZLossTerm] + evaluation.terms[kConfidencePenaltyTerm];
  std::vector<double> own(vocab_size, 0);  // s_c
  own[target] = evaluation.target_coefficient;
  for (int k = 0; k < kCandidates; ++k) {
    const int32_t id = problem.ids[row_index * kCandidates + k];
    const bool is_soft = problem.flags & kSoftTargets && k > 0;  // the second group
    if (id < 0 || (id == target && !is_soft) || logits[id] == -INFINITY) continue;
    const double weight = problem.weights[row_index * kCandidates + k];
    const CandidateShare<double> share = is_soft ? soft_target(std::log1p(row.rest), u_of(id), weight)
                                                 : unlikelihood(row, id == argmax, p_of(id), weight);
    expected.loss += share.loss;
    own[id] += share.log_prob_coefficient;
  }
  double sum_but_maximum = 0;
  for (int j = 0; j < vocab_size; ++j) sum_but_maximum += j == argmax ? 0 : own[j];
  const double row_weight = problem.row_weights[row_index];
  for (int j = 0; j < vocab_size; ++j) {
    if (logits[j] == -INFINITY) continue;
    const double others = j == argmax ? sum_but_maximum : sum_but_maximum - own[j] + own[argmax];
    const double dz = sparse_gradient(row, evaluation.coefficients, j == argmax, u_of(j), p_of(j), own[j], others);
    const double slope = is_capped ? 1 - std::pow(std::tanh(logits[j] / options.softcap), 2) : 1;
    expected.gradient[j] = row_weight * dz * slope / options.temperature;
  }
  expected.loss *= row_weight;
  return expected;
}

// Both ways: fused, and statistics first and the gradient from them.
template <class Element>
void check(const SoftmaxRowsLaunchers& kernels, const Problem& problem, const DeviceLimits& device, bool fused) {
  const Shape& shape = problem.shape;
  const int stride = shape.n_columns + shape.extra_stride, vocab_size = shape.n_columns - shape.padding;
  Rows<Element> logits(kRows, shape.n_columns, stride, shape.shift),
      separate(kRows, shape.n_columns, shape.n_columns, shape.gradient_shift);
  std::fill_n(logits.memory.get(), logits.size, from_float<Element>(NAN));  // where nobody may look
  for (int row = 0; row < kRows; ++row)
    for (int j = 0; j < vocab_size && row != kIgnored; ++j)
      logits.data[size_t(row) * stride + j] = from_float<Element>(problem.logits[row][j]);
  Rows<Element>& gradient = shape.in_place ? logits : separate;

  std::vector<float> row_loss(kRows, -1.f), row_terms((kRowTerms + 2) * kRows, -1.f), statistics(kRows * 6);
  std::vector<float> coefficients(kRows * (5 + kCandidates));
  RowArguments arguments{};
  arguments.logits = logits.data;
  arguments.logits_layout = logits.layout(kRows);
  arguments.options = &problem.options;
  arguments.targets = problem.targets.data();
  arguments.ignore_index = -100;
  arguments.row_weights = problem.row_weights.data();
  arguments.ids = problem.ids.data();
  arguments.id_values = problem.weights.data();
  arguments.row_loss = row_loss.data();
  arguments.row_terms = row_terms.data();
  arguments.n_rows = kRows;
  arguments.n_columns = shape.n_columns;
  arguments.vocab_size = vocab_size;
  arguments.n_ids = kCandidates;
  arguments.n_groups = 2;
  arguments.group_sizes[0] = 1;
  arguments.group_sizes[1] = kCandidates - 1;
  arguments.flags = problem.flags;
  if (fused) {
    arguments.grad_logits = gradient.data;
    arguments.grad_layout = gradient.layout(kRows);
  } else {
    arguments.statistics = statistics.data();
    arguments.row_coefficients = coefficients.data();
  }
  kernels.row_loss("row_loss", arguments, device, nullptr);

  if (!fused) {
    std::vector<float> of_ids;  // the statistics' own s_c, then those of the target and the candidates
    std::vector<int32_t> ids;
    for (int row = 0; row < kRows; ++row) {
      ids.push_back(problem.targets[row] < 0 ? -1 : int32_t(problem.targets[row]));
      for (int k = 0; k < kCandidates; ++k) ids.push_back(problem.ids[row * kCandidates + k]);
    }
    RowArguments second = arguments;
    second.targets = nullptr;
    second.row_weights = second.id_values = nullptr;
    second.row_loss = second.row_terms = nullptr;
    second.n_groups = 0;
    second.ids = ids.data();
    second.n_ids = 1 + kCandidates;
    second.grad_logits = gradient.data;
    second.grad_layout = gradient.layout(kRows);
    kernels.row_gradient("row_gradient", second, device, nullptr);
  }

  const double rounding = sizeof(Element) == 4 ? 4e-6 : std::is_same<Element, __half>::value ? 1. / 2040 : 1. / 255;
  for (int row = 0; row < kRows; ++row) {
    const Expected expected = expected_row(problem, row);
    EXPECT_CLOSE(row_loss[row], expected.loss, 4e-6);
    double size = 0;
    for (const double value : expected.gradient) size = std::max(size, std::fabs(value));
    for (int j = 0; j < shape.n_columns; ++j) {
      const double got = to_float(gradient.data[size_t(row) * gradient.stride + j]);
      const double wanted = j < vocab_size ? expected.gradient[j] : 0;
      const double floor = 4e-7 * size + (std::is_same<Element, __half>::value ? 6e-8 : 0);
      if (std::fabs(got - wanted) <= rounding * std::fabs(wanted) + floor) continue;
      expect::fail(__FILE__, __LINE__, "gradient");
      std::printf("    row %d column %d of %d: got %.9g, expected %.9g; flags %d fused %d in place %d\n", row, j,
                  shape.n_columns, got, wanted, problem.flags, fused, shape.in_place);
    }
  }
}

// A device on which rows of some hundred columns go every way that long rows go on a GPU. With 8 blocks on a
// multiprocessor a block has few threads, each of them several vectors.
DeviceLimits small_device(int shared_per_block, int largest_cluster, int blocks = 2) {
  return {1, blocks * shared_per_block, shared_per_block, 0, largest_cluster};
}

constexpr DeviceLimits kH200{132, 228 * 1024, 227 * 1024, 1024, 8}, kA100{108, 164 * 1024, 163 * 1024, 1024, 1};
constexpr DeviceLimits kOneBlock{0, 228 * 1024, 227 * 1024, 1024, 8};  // an H200 where one block takes all rows

void test_plans() {
  const auto expect_plan = [](const DeviceLimits& device, int n_columns, int element_bytes, Residence residence,
                              int cluster_size) {
    const RowPlan plan = plan_rows(n_columns, element_bytes, 8, device);
    EXPECT(plan.residence == residence);
    EXPECT(plan.cluster_size == cluster_size);
    EXPECT(plan.shared_bytes <= size_t(device.shared_per_block));
    EXPECT(plan.n_threads % 32 == 0 && plan.n_threads >= 32 && plan.n_threads <= 1024);
    EXPECT(int64_t(plan.capacity) * cluster_size * 16 >= int64_t(n_columns) * element_bytes);
    EXPECT(plan.clusters_at_once(device) >= 1);
  };
  expect_plan(kH200, 4800, 2, Residence::warp, 1);
  expect_plan(kH200, 5100, 2, Residence::shared, 1);
  expect_plan(kH200, 32000, 2, Residence::shared, 1);
  expect_plan(kH200, 50257, 2, Residence::shared, 1);
  expect_plan(kH200, 128256, 2, Residence::clusters, 4);
  expect_plan(kH200, 128256, 4, Residence::clusters, 8);
  expect_plan(kH200, 262144, 4, Residence::clusters, 8);
  expect_plan(kH200, 600000, 4, Residence::streamed, 1);
  expect_plan(kA100, 32000, 2, Residence::shared, 1);
  expect_plan(kA100, 128256, 2, Residence::streamed, 1);

  // short rows: few warps for each, or several for one warp, and enough at once
  const auto expect_threads = [](int n_columns, int n_ids, int rows_at_once, int n_threads, int n_blocks) {
    const RowPlan plan = plan_rows(n_columns, 2, n_ids, kH200);
    EXPECT(plan.rows_at_once == rows_at_once && plan.n_threads == n_threads);
    EXPECT(plan.blocks_per_multiprocessor == n_blocks);
  };
  expect_threads(128, 0, 16, 32, 22);
  expect_threads(128, 4, 8, 32, 24);  // two entries for each lane at most
  expect_threads(128, 8, 4, 32, 24);
  expect_threads(128, 32, 1, 32, 24);
  expect_threads(1024, 0, 4, 32, 22);
  expect_threads(2048, 0, 2, 32, 23);
  expect_threads(4096, 0, 1, 32, 24);
  expect_threads(6000, 0, 1, 64, 16);
  expect_threads(12000, 0, 1, 96, 9);
  expect_threads(14000, 0, 1, 128, 7);
  for (int n_columns = 1; n_columns < 20000; n_columns += 7) {  // everything that is planned for is there
    const RowPlan plan = plan_rows(n_columns, 2, 8, kH200);
    EXPECT(plan.blocks_per_multiprocessor * plan.n_threads <= kThreadsPerMultiprocessor);
    EXPECT(plan.blocks_per_multiprocessor * (int(plan.shared_bytes) + 1024) <= kH200.shared_per_multiprocessor);
  }
}

template <class Element>
void test_every_residence(const SoftmaxRowsLaunchers& kernels) {
  struct Way {
    DeviceLimits device;
    int n_columns;
    Residence residence;
    int cluster_size;
  };
  constexpr int kScale = 4 / int(sizeof(Element));  // the same bytes for every type
  const Way ways[] = {{kH200, 1, Residence::warp, 1},
                      {kOneBlock, 250 * kScale, Residence::warp, 1},     // several rows at once
                      {kOneBlock, 1001 * kScale, Residence::warp, 1},    // two, several vectors a thread
                      {kOneBlock, 2051 * kScale, Residence::warp, 1},    // one
                      {kOneBlock, 3001 * kScale, Residence::shared, 1},  // two warps
                      {small_device(4608, 8), 701 * kScale, Residence::shared, 1},
                      {small_device(20480, 1, 8), 3401 * kScale, Residence::shared, 1},
                      {small_device(5120, 8), 1001 * kScale, Residence::clusters, 2},
                      {small_device(10240, 8, 8), 3401 * kScale, Residence::clusters, 2},
                      {small_device(7424, 8), 2501 * kScale, Residence::clusters, 4},
                      {small_device(14080, 8), 9601 * kScale, Residence::clusters, 8},
                      {small_device(4096, 1), 1100 * kScale, Residence::streamed, 1}};
  const int flags[] = {kCrossEntropy, kCrossEntropy | kFocal | kLabelSmoothing | kZLoss | kConfidencePenalty,
                       kCrossEntropy | kLabelSmoothing | kSoftcap | kEaft,
                       kCrossEntropy | kDft | kSoftTargets | kTargetWeights};
  int variant = 0;
  for (const Way& way : ways) {
    const RowPlan plan = plan_rows(way.n_columns, int(sizeof(Element)), kCandidates, way.device);
    EXPECT(plan.residence == way.residence && plan.cluster_size == way.cluster_size);
    for (const int terms : flags) {
      ++variant;
      // ThreadSanitizer takes its time: every combination for one type only
      const bool is_main_type = std::is_same<Element, __nv_bfloat16>::value;
      if (!is_main_type && (variant % 4 > 0 || way.cluster_size == 8)) continue;
      const int padding = way.n_columns > 8 ? variant % 3 * 2 : 0;
      const Shape shape{way.n_columns, padding, variant % 2 * 3, variant % 4, variant % 3, variant % 2 == 0};
      const Problem problem = make_problem<Element>(shape, terms, variant);
      cuda_emulator::options().device = way.device;
      cuda_emulator::options().order = cuda_emulator::Order(variant % 3);
      cuda_emulator::options().seed = variant;
      for (const bool fused : {true, false}) {
        const std::string report =
            cuda_emulator::report_of([&] { check<Element>(kernels, problem, way.device, fused); });
        if (!report.empty()) expect::fail(__FILE__, __LINE__, report.c_str());
      }
    }
  }
}

// Where the device places no cluster as large as its kind allows: half of it, and no cluster at last.
void test_clusters_without_room() {
  const Problem problem = make_problem<__nv_bfloat16>({5003, 0, 0, 0, 0, false}, kCrossEntropy | kLabelSmoothing, 1);
  const DeviceLimits kinds[] = {small_device(7424, 8), small_device(7424, 8)};
  for (const int room : {2, 1}) {
    const DeviceLimits& device = kinds[room - 1];
    EXPECT(plan_rows(5003, 2, kCandidates, device).cluster_size == 4);
    cuda_emulator::options().device = small_device(7424, room);
    const std::string report =
        cuda_emulator::report_of([&] { check<__nv_bfloat16>(softmax_rows_bfloat16, problem, device, true); });
    if (!report.empty()) expect::fail(__FILE__, __LINE__, report.c_str());
  }
}

int main() {
  test_plans();
  test_clusters_without_room();
  test_every_residence<float>(softmax_rows_float32);
  test_every_residence<__nv_bfloat16>(softmax_rows_bfloat16);
  test_every_residence<__half>(softmax_rows_float16);
  return expect::exit_code();
}
