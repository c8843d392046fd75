// The CUDA kernels of router rows against the formulas of csrc/router_rows.h in float64, row by row.
#include <algorithm>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "../../csrc/cuda/router_rows.cuh"
#include "schedules.h"

using namespace ava;

namespace {

struct Case {
  int64_t n_layers, n_rows, n_experts, k;
  int64_t n_segments;        // 0: none are given
  int64_t more_columns = 0;  // between rows, so that they are aligned to nothing
  bool own_choice = true, biased = false;
  int masked = 0;  // n: every n-th row is sure of an expert, and the others have logits of -inf; 0: none
};

// What a call is given, drawn at random, and what has to come out.
template <class Element, bool kSigmoid>
struct Problem {
  using Real = RealOf<Element>;
  Case shape;
  int64_t n_segments, n_groups, row_stride;
  std::vector<Element> logits;  // [n_layers, n_rows, row_stride]
  std::vector<char> mask;       // [n_layers, n_rows]
  std::vector<int64_t> segment_ids, indices;
  std::vector<Real> bias, grad_vectors[2], grad_scalars[2];
  std::vector<double> vectors[2], scalars[2], gradient;
  std::vector<int64_t> counts, n_rows;
  std::vector<uint8_t> choice;  // [n_layers, n_rows, bytes_of_choice]

  Problem(const Case& shape, uint64_t seed) : shape(shape) {
    std::mt19937_64 random(seed);
    std::normal_distribution<double> normal(0, 2);
    const auto draw = [&](size_t n, auto value) {
      std::vector<decltype(value())> values(n);
      for (auto& one : values) one = value();
      return values;
    };
    n_segments = std::max<int64_t>(shape.n_segments, 1);
    n_groups = shape.n_layers * n_segments;
    row_stride = shape.n_experts + shape.more_columns;
    const size_t n_all = size_t(shape.n_layers * shape.n_rows);
    logits = draw(n_all * row_stride, [&] { return from_real<Element>(normal(random)); });
    for (size_t i = 0; shape.masked && i < logits.size(); ++i) {
      const bool is_sure = int(i / row_stride) % shape.masked == 0;
      if (is_sure && i % row_stride == 3) logits[i] = from_real<Element>(20);
      if (!is_sure && random() % 16 == 0) logits[i] = from_real<Element>(-INFINITY);
    }
    mask = draw(n_all, [&] { return char(random() % 4 != 0); });
    segment_ids = draw(shape.n_rows, [&] { return int64_t(random() % (n_segments + 1)) - 1; });
    indices = draw(n_all * shape.k, [&] { return int64_t(random() % shape.n_experts); });
    bias = draw(shape.n_layers * shape.n_experts, [&] { return Real(normal(random)); });
    for (auto& values : grad_vectors) values = draw(n_groups * shape.n_experts, [&] { return Real(normal(random)); });
    for (auto& values : grad_scalars) values = draw(n_groups, [&] { return Real(normal(random)); });
    expect_all();
  }

  void expect_all() {
    for (auto& values : vectors) values.assign(n_groups * shape.n_experts, 0);
    for (auto& values : scalars) values.assign(n_groups, 0);
    counts.assign(n_groups * shape.n_experts, 0);
    n_rows.assign(n_groups, 0);
    gradient.assign(shape.n_layers * shape.n_rows * shape.n_experts, 0);
    choice.assign(shape.n_layers * shape.n_rows * bytes_of_choice(shape.n_experts), 0);
    for (int64_t layer = 0; layer < shape.n_layers; ++layer)
      for (int64_t row = 0; row < shape.n_rows; ++row) {
        const int64_t segment = shape.n_segments ? segment_ids[row] : 0;
        if (segment >= 0 && mask[layer * shape.n_rows + row]) expect_row(layer, row, layer * n_segments + segment);
      }
  }

  static std::vector<double> softmax(const std::vector<double>& y, double& lse) {
    const double max = *std::max_element(y.begin(), y.end());
    double total = 0;
    for (double value : y) total += std::exp(value - max);
    lse = max + std::log(total);
    std::vector<double> p(y.size());
    for (size_t e = 0; e < y.size(); ++e) p[e] = std::exp(y[e] - lse);
    return p;
  }

  void expect_row(int64_t layer, int64_t row, int64_t group) {
    const int64_t n = shape.n_experts, at = layer * shape.n_rows + row;
    std::vector<double> z(n), y(n), score(n), v(n);
    for (int64_t e = 0; e < n; ++e) {
      z[e] = to_real(logits[at * row_stride + e]);
      y[e] = kSigmoid ? -std::log1p(std::exp(-z[e])) : z[e];
    }
    double lse = 0, lse_of_scores = 0;
    const std::vector<double> of_softmax = softmax(z, lse), p = softmax(y, lse_of_scores);
    for (int64_t e = 0; e < n; ++e)
      score[e] = shape.biased ? (kSigmoid ? 1 / (1 + std::exp(-z[e])) : p[e]) + double(bias[layer * n + e]) : z[e];
    std::vector<int32_t> chosen(shape.k);
    if (shape.own_choice)
      choose<double>(n, shape.k, [&](int64_t e) { return score[e]; }, chosen.data());
    else
      std::copy_n(indices.begin() + at * shape.k, shape.k, chosen.begin());
    for (int32_t e : chosen) set_chosen(choice.data() + at * bytes_of_choice(n), e);

    double entropy = 0, mean = 0;
    for (int64_t e = 0; e < n; ++e) {
      if (p[e] > 0) entropy -= p[e] * (y[e] - lse_of_scores);
      vectors[0][group * n + e] += p[e];
      v[e] = double(grad_vectors[0][group * n + e]);
    }
    for (int64_t slot = 0; slot < shape.k; ++slot) {
      const int64_t e = group * n + chosen[slot];
      ++counts[e];
      vectors[1][e] += p[chosen[slot]];
      v[chosen[slot]] += double(grad_vectors[1][e]);
    }
    scalars[0][group] += lse * lse;
    scalars[1][group] += entropy;
    ++n_rows[group];

    for (int64_t e = 0; e < n; ++e) mean += p[e] * v[e];
    const double zeta = double(grad_scalars[0][group]), eta = double(grad_scalars[1][group]);
    for (int64_t e = 0; e < n; ++e) {
      const double by_y = p[e] > 0 ? p[e] * (v[e] - mean - eta * (y[e] - lse_of_scores + entropy)) : 0;
      const double slope = kSigmoid ? 1 / (1 + std::exp(z[e])) : 1;
      gradient[at * n + e] = by_y * slope + 2 * zeta * lse * of_softmax[e];
    }
  }

  // As csrc/cuda/router_rows.cu has it, with a sort on the host.
  void check() const {
    const int64_t n = shape.n_experts, n_all = shape.n_layers * shape.n_rows;
    RouterArguments<Real> arguments{};
    for (int64_t layer = 0; layer < shape.n_layers; ++layer)
      arguments.logits[layer] = logits.data() + layer * shape.n_rows * row_stride;
    arguments.layout = {1, {shape.n_rows}, {row_stride}};
    arguments.n_rows = shape.n_rows;
    arguments.n_experts = n;
    arguments.k = shape.k;
    arguments.n_segments = n_segments;
    arguments.rows_in_slot = rows_in_slot(n);
    arguments.n_slots = most_slots(shape.n_rows, n, n_segments, shape.n_segments > 0);
    arguments.row_mask = reinterpret_cast<const bool*>(mask.data());
    arguments.mask_stride = shape.n_rows;
    std::vector<int64_t> order(shape.n_rows), starts(n_segments + 2, -1);
    if (shape.n_segments) {
      std::vector<int32_t> keys(shape.n_rows), sorted(shape.n_rows);
      write_segment_keys(segment_ids.data(), shape.n_rows, n_segments, keys.data(), nullptr);
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return keys[a] < keys[b]; });
      for (int64_t place = 0; place < shape.n_rows; ++place) sorted[place] = keys[order[place]];
      write_segment_starts(sorted.data(), shape.n_rows, n_segments, starts.data(), nullptr);
      arguments.order = order.data();
      arguments.segment_starts = starts.data();
    }
    std::vector<uint8_t> own(choice.size(), 7);
    if (shape.own_choice)
      arguments.new_choice = own.data();
    else
      arguments.wide_indices = indices.data();
    if (shape.biased) arguments.expert_bias = bias.data();
    // nan: what is read before it is written shows
    std::vector<Real> sums(shape.n_layers * arguments.n_slots * (2 * n + 2), Real(NAN));
    std::vector<int32_t> slot_counts(shape.n_layers * arguments.n_slots * (n + 1), 1 << 30);
    std::vector<WideRouterRow<Real>> wide_rows(is_wide_router<Real>(n, !shape.own_choice, shape.k) ? n_all : 0);
    arguments.sums = sums.data();
    arguments.counts = slot_counts.data();
    arguments.wide_rows = wide_rows.data();
    std::vector<Real> got_vectors[2], got_scalars[2];
    for (auto& values : got_vectors) values.resize(n_groups * n);
    for (auto& values : got_scalars) values.resize(n_groups);
    std::vector<int64_t> got_counts(n_groups * n), got_rows(n_groups);
    run_router<Element, kSigmoid>(false, arguments, shape.n_layers, nullptr);
    add_group_sums<Real>(arguments, n_groups,
                         {got_vectors[0].data(), got_vectors[1].data(), got_scalars[0].data(), got_scalars[1].data(),
                          got_counts.data(), got_rows.data()},
                         nullptr);
    const double tolerance = sizeof(Real) == 8 ? 1e-13 : 2e-6;
    EXPECT(got_counts == counts);
    EXPECT(got_rows == n_rows);
    if (shape.own_choice) EXPECT(own == choice);
    for (int which = 0; which < 2; ++which) {
      for (int64_t i = 0; i < n_groups * n; ++i) EXPECT_CLOSE(got_vectors[which][i], vectors[which][i], tolerance);
      for (int64_t i = 0; i < n_groups; ++i) EXPECT_CLOSE(got_scalars[which][i], scalars[which][i], tolerance);
    }

    std::vector<Element> got_gradient(n_all * n, from_real<Element>(NAN));
    arguments.choice = std::exchange(arguments.new_choice, nullptr);
    arguments.grad_probability = grad_vectors[0].data();
    arguments.grad_importance = grad_vectors[1].data();
    arguments.grad_lse_squared = grad_scalars[0].data();
    arguments.grad_entropy = grad_scalars[1].data();
    arguments.grad_logits = got_gradient.data();
    run_router<Element, kSigmoid>(true, arguments, shape.n_layers, nullptr);
    const double rounding = sizeof(Element) == 2 ? (std::is_same<Element, __half>::value ? 5e-4 : 4e-3) : 0;
    for (int64_t i = 0; i < n_all * n; ++i) {
      const double error = std::fabs(to_real(got_gradient[i]) - gradient[i]);
      EXPECT(error <= rounding * std::fabs(gradient[i]) + 20 * tolerance);
    }
  }
};

template <class Element, bool kSigmoid>
void test_problem(const Case& shape, int n_random = 0) {
  const Problem<Element, kSigmoid> problem(shape, uint64_t(shape.n_experts + shape.n_rows));
  cuda_emulator::under_every_schedule([&] { problem.check(); }, n_random);
}

// Of which scores rows are: few different ones, so that most are equal, also infinities, both zeros, and nan; 256 numbers;
// the same with a nan; k - 1 of them, and -inf.
enum class Scores { few, many, nan, masked };

template <class Element>
void test_choices(int64_t n_experts, int64_t k, Scores of) {
  constexpr int64_t kRows = 40;
  const float values[] = {1, -1, 0.f, -0.f, -INFINITY, 2, -1e-40f, INFINITY, NAN};
  std::mt19937_64 random(uint64_t(n_experts * 16 + k));
  std::vector<Element> logits(kRows * n_experts);
  for (int64_t row = 0; row < kRows; ++row) {
    const size_t n_values = row % 4 == 0 ? 9 : row % 4 == 1 ? 2 : row % 4 == 2 ? 5 : 7;
    for (int64_t e = 0; e < n_experts; ++e) {
      float score = of == Scores::few ? values[random() % n_values] : float(int64_t(random() % 256) - 128) / 16;
      if (of == Scores::nan && e == row % n_experts) score = NAN;
      if (of == Scores::masked && (e + row) % n_experts >= k - 1) score = -INFINITY;
      logits[row * n_experts + e] = from_float<Element>(score);
    }
  }
  RouterArguments<float> arguments{};
  arguments.logits[0] = logits.data();
  arguments.layout = {1, {kRows}, {n_experts}};
  arguments.n_rows = kRows;
  arguments.n_experts = n_experts;
  arguments.k = k;
  arguments.n_segments = arguments.n_slots = 1;
  arguments.rows_in_slot = rows_in_slot(n_experts);
  const int64_t n_bytes = bytes_of_choice(n_experts);
  std::vector<uint8_t> choice(kRows * n_bytes, 7), expected_choice(kRows * n_bytes);
  std::vector<int32_t> counts(n_experts + 1), expected(k), expected_counts(n_experts + 1);
  std::vector<float> sums(2 * n_experts + 2);
  std::vector<WideRouterRow<float>> wide_rows(kRows);
  arguments.wide_rows = wide_rows.data();
  arguments.new_choice = choice.data();
  arguments.sums = sums.data();
  arguments.counts = counts.data();
  run_router<Element, false>(false, arguments, 1, nullptr);
  for (int64_t row = 0; row < kRows; ++row) {
    choose<float>(n_experts, k, [&](int64_t e) { return to_float(logits[row * n_experts + e]); }, expected.data());
    for (int32_t e : expected) {
      set_chosen(expected_choice.data() + row * n_bytes, e);
      ++expected_counts[e];
    }
  }
  EXPECT(choice == expected_choice);
  expected_counts[n_experts] = kRows;
  EXPECT(counts == expected_counts);
  for (int64_t e = 0; e < n_experts; ++e)  // also beside rows of nan
    if (counts[e] == 0) EXPECT(sums[n_experts + e] == 0);
}

void test_an_index_out_of_range_is_an_assert() {
  const std::vector<float> logits(3 * 8);
  const std::vector<int32_t> indices = {0, 1, 8};
  std::vector<float> sums(18);
  std::vector<int32_t> counts(9);
  RouterArguments<float> arguments{};
  arguments.logits[0] = logits.data();
  arguments.layout = {1, {3}, {8}};
  arguments.n_rows = 3;
  arguments.n_experts = 8;
  arguments.k = arguments.n_segments = arguments.n_slots = 1;
  arguments.rows_in_slot = rows_in_slot(8);
  arguments.indices = indices.data();
  arguments.sums = sums.data();
  arguments.counts = counts.data();
  EXPECT_REPORT((run_router<float, false>(false, arguments, 1, nullptr)), "device assert failed", "expert");
  int32_t key = 0;
  const int64_t segment = 4;
  EXPECT_REPORT(write_segment_keys(&segment, 1, 4, &key, nullptr), "device assert failed", "segment");
}

void test_slots_have_room_for_every_segment() {
  std::mt19937_64 random(1);
  for (int round = 0; round < 50; ++round) {
    RouterArguments<float> arguments{};
    arguments.n_segments = 1 + int64_t(random() % 6);
    arguments.rows_in_slot = 1 + int64_t(random() % 5);
    std::vector<int64_t> starts(arguments.n_segments + 2, 0);
    for (size_t i = 1; i < starts.size(); ++i) starts[i] = starts[i - 1] + int64_t(random() % 12);
    arguments.n_rows = starts.back();
    arguments.segment_starts = starts.data();
    std::vector<int> seen(arguments.n_rows);
    const int64_t n_slots = arguments.n_rows / arguments.rows_in_slot + arguments.n_segments + 1;
    for (int64_t slot = 0; slot < n_slots; ++slot) {
      const RouterSlot rows = arguments.rows_of_slot(slot);
      for (int64_t place = rows.begin; place < rows.end; ++place) {
        ++seen[place];
        EXPECT(starts[rows.segment] <= place && place < starts[rows.segment + 1]);
      }
    }
    EXPECT(std::count(seen.begin(), seen.end(), 1) == arguments.n_rows);
  }
}

// A network that sorts every sequence of zeros and ones sorts all. Both halves at once: the upper one has ones for zeros.
void test_the_network_sorts() {
  for (int bits = 0; bits < 256; ++bits) {
    __half2 scores[kBest];
    for (int i = 0; i < kBest; ++i) scores[i] = __floats2half2_rn(float(bits >> i & 1), float(~bits >> i & 1));
    sort_best(scores);
    const int n_ones = __builtin_popcount(unsigned(bits));
    for (int i = 0; i < kBest; ++i) {
      EXPECT(to_float(scores[i].x) == float(i < n_ones));
      EXPECT(to_float(scores[i].y) == float(i < kBest - n_ones));
    }
  }
}

}  // namespace

int main() {
  for (int64_t n_experts : {3, 8, 16, 20, 31, 60, 64, 128, 200, 256, 500, 512})
    for (int64_t k : {3, 4, 5, 6, 7, 8})
      for (Scores of : {Scores::few, Scores::many, Scores::nan, Scores::masked})
        test_choices<__nv_bfloat16>(n_experts, std::min(k, n_experts), of);
  test_choices<__nv_bfloat16>(600, 3, Scores::nan);
  for (Scores of : {Scores::few, Scores::many, Scores::masked}) {
    test_choices<__half>(31, 8, of);
    test_choices<float>(100, 7, of);
  }
  test_the_network_sorts();
  test_problem<__nv_bfloat16, false>({1, 70, 64, 8, 0}, 1);
  test_problem<__nv_bfloat16, false>({1, 70, 64, 8, 0, 0, true, false, 3});
  test_problem<__half, false>({1, 40, 100, 3, 2, 0, false, false, 2});
  test_problem<__nv_bfloat16, false>({1, 40, 128, 8, 0, 0, true, false, 1});
  test_problem<__half, true>({1, 40, 250, 5, 2, 1});
  test_problem<__nv_bfloat16, false>({1, 40, 8, 8, 0});
  test_problem<float, false>({2, 70, 8, 2, 0}, 1);
  test_problem<float, true>({1, 300, 64, 2, 3, 0, false}, 1);
  test_problem<__nv_bfloat16, false>({1, 300, 60, 4, 0, 3}, 1);
  test_problem<__nv_bfloat16, true>({2, 9, 130, 3, 2, 6, true, true});
  test_problem<__half, false>({1, 40, 512, 3, 0, 0, false});
  test_problem<__half, true>({1, 5, 257, 2, 0, 1, true, true});
  test_problem<float, false>({1, 20, 300, 2, 2, 0, true, true});
  test_problem<float, true>({1, 6, 600, 2, 2});
  test_problem<__nv_bfloat16, false>({1, 6, 513, 2, 0, 0, true, true});
  test_problem<double, false>({2, 150, 5, 2, 2}, 1);
  test_problem<double, true>({1, 20, 40, 3, 0, 1, false});
  test_problem<float, false>({1, 9, 24, 20, 0, 0, false});  // more choices than registers count
  test_problem<__nv_bfloat16, false>({1, 40, 16, 15, 0, 0, false});
  test_problem<float, false>({1, 3, 1, 1, 1});
  test_an_index_out_of_range_is_an_assert();
  test_slots_have_room_for_every_segment();
  return expect::exit_code();
}
