// The CUDA kernels of repetition candidates against the lists of csrc/repetition.h, for which other tests vouch.
#include <algorithm>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cuda/repetition.cuh"
#include "../../csrc/cuda/repetition_order.cuh"
#include "schedules.h"

using namespace ava;

struct Problem {
  RepetitionOptions options;
  std::vector<int64_t> tokens;    // [n_sequences, n_tokens]
  std::vector<int64_t> segments;  // alike, or empty
  int64_t n_sequences = 2;

  int64_t n_tokens() const { return int64_t(tokens.size()) / n_sequences; }
};

struct Slots {
  explicit Slots(const Problem& problem)
      : ids(problem.tokens.size() * problem.options.n_slots()), weights(ids.size()) {}

  std::vector<int32_t> ids;
  std::vector<float> weights;
};

static const std::vector<float> kWeights = {0.5f, 1.5f, 0.05f, 0.1f};

static Slots expected_slots(const Problem& problem) {
  Slots slots(problem);
  FollowerLists<> lists;
  for (size_t begin = 0, end; begin < problem.tokens.size(); begin = end) {
    const size_t n_tokens = problem.n_tokens();
    for (end = begin + 1; end % n_tokens != 0;) {
      if (!problem.segments.empty() && problem.segments[end] != problem.segments[begin]) break;
      ++end;
    }
    const int64_t* const text = problem.tokens.data() + begin;
    const size_t first = begin * problem.options.n_slots();
    segment_candidates<float>(problem.options, {0.5, 1.5, 0.05f, 0.1f}, text, text, int64_t(end - begin), lists,
                              slots.ids.data() + first, slots.weights.data() + first);
  }
  return slots;
}

// In linear time, as the operator does with many tokens.
static void write_by_order(RepetitionArguments<float> arguments, uint64_t hash_bits, bool& collides) {
  const size_t n_rows = arguments.n_sequences * arguments.n_tokens;
  std::vector<int32_t> starts(n_rows), runs(n_rows), counted(n_rows);
  const TextFacts facts{starts.data(), runs.data(), counted.data()};
  write_text_facts(arguments, facts, nullptr);
  write_run_slots(arguments, facts, nullptr);
  if (arguments.ngram_size == 0) return;
  RowOrder order{};
  order.n_rows = int64_t(n_rows);
  order.hash_bits = hash_bits;
  std::vector<int64_t> hashes(n_rows), sorted(n_rows), rows(n_rows);
  order.hashes = hashes.data();
  write_key_hashes(arguments, facts, order, nullptr);
  std::iota(rows.begin(), rows.end(), 0);
  std::stable_sort(rows.begin(), rows.end(), [&](int64_t i, int64_t j) { return hashes[i] < hashes[j]; });
  std::transform(rows.begin(), rows.end(), sorted.begin(), [&](int64_t row) { return hashes[row]; });
  order.sorted = sorted.data();
  order.rows = rows.data();
  const size_t n_lists = order.n_chunks() + order.n_spans();
  std::vector<int32_t> tokens(32 * n_lists), positions(32 * n_lists), lengths(n_lists), collisions(n_lists);
  order.tokens = tokens.data();
  order.positions = positions.data();
  order.lengths = lengths.data();
  order.collisions = collisions.data();
  write_ngram_slots(arguments, facts, order, nullptr);
  const auto first = collisions.begin() + order.n_chunks();
  collides = std::any_of(first, collisions.end(), [](int32_t number) { return number != 0; });
  arguments.reads_runs = false;
  arguments.collisions = &*first;
  arguments.n_collisions = order.n_spans();
  write_candidates(arguments, nullptr);
}

enum class Way { reading, order, order_with_collisions };

static void expect_agrees(const Problem& problem, Way way) {
  const Slots expected = expected_slots(problem);
  Slots slots(problem);
  std::vector<int32_t> listed(problem.options.repetition_allow_list.size() + problem.options.eos_ids.size());
  std::vector<int32_t> lists(problem.options.repetition_allow_list.begin(),
                             problem.options.repetition_allow_list.end());
  lists.insert(lists.end(), problem.options.eos_ids.begin(), problem.options.eos_ids.end());
  store_ids(lists, listed.data(), nullptr);
  RepetitionArguments<float> arguments{};
  arguments.tokens = arguments.targets = {problem.tokens.data(), false, problem.n_tokens(), 1};
  arguments.weights = kWeights.data();
  arguments.weight_stride = 1;
  arguments.n_sequences = problem.n_sequences;
  arguments.n_tokens = problem.n_tokens();
  arguments.set_options(problem.options, listed.data());
  if (!problem.segments.empty()) arguments.segments = {problem.segments.data(), false, problem.n_tokens(), 1};
  arguments.ids = slots.ids.data();
  arguments.candidate_weights = slots.weights.data();
  bool collides = false;
  if (way == Way::reading)
    write_candidates(arguments, nullptr);
  else
    write_by_order(arguments, way == Way::order ? ~uint64_t(0) : uint64_t(4), collides);
  EXPECT(collides == (way == Way::order_with_collisions));
  EXPECT(slots.ids == expected.ids);
  for (size_t i = 0; i < slots.ids.size(); ++i) EXPECT_CLOSE(slots.weights[i], expected.weights[i], 1e-6);
}

static Problem problem_of(int64_t ngram_size, int64_t n_tokens, uint64_t seed) {
  Problem problem;
  std::mt19937_64 random(seed);
  RepetitionOptions& options = problem.options;
  options.vocab_size = 5;
  options.repetition_allow_list = {2};
  options.use_immediate_repetition_penalty = true;
  options.ngram_size = ngram_size;
  options.ngram_slots = 3;
  options.ngram_window_size = seed % 2 ? 0 : 50;
  options.eos_ids = {0};
  options.min_sequence_length = 40;
  problem.tokens.resize(problem.n_sequences * n_tokens);
  for (int64_t& token : problem.tokens) token = random() % 12 == 0 ? options.ignore_index : int64_t(random() % 5);
  return problem;
}

static void test_agrees_with_the_lists(int64_t ngram_size, int64_t n_tokens, uint64_t seed) {
  Problem problem = problem_of(ngram_size, n_tokens, seed);
  cuda_emulator::under_every_schedule([&] {
    expect_agrees(problem, Way::reading);
    expect_agrees(problem, Way::order);
    if (ngram_size > 1 && n_tokens > 40) expect_agrees(problem, Way::order_with_collisions);
  });
  problem.options.tokens_include_row = true;
  expect_agrees(problem, Way::reading);
  expect_agrees(problem, Way::order);
}

// Long texts of few distinct tokens: lists of many chunks and of more than one span, groups that begin at their edges.
static void test_long_text(const std::string& text, int64_t ngram_size, bool tokens_include_row) {
  Problem problem = problem_of(ngram_size, 2, 1);
  problem.n_sequences = 1;
  problem.options.tokens_include_row = tokens_include_row;
  problem.options.repetition_allow_list = {};
  constexpr int64_t n_tokens = 2 * kChunkRows * kSpanChunks + 1000;
  std::mt19937_64 random(ngram_size);
  problem.tokens.assign(n_tokens, 1);
  problem.segments.assign(text == "packed" ? n_tokens : 0, 0);
  for (int64_t t = 0; t < n_tokens; ++t) {
    if (text == "period") problem.tokens[t] = t / 3 % 3;     // a run over each tile's edge
    if (text == "rare" && t < 5) problem.tokens[t] = 4 - t;  // found at the very beginning by all
    if (text == "packed") {
      problem.segments[t] = t / 5000;
      problem.tokens[t] = random() % 64 ? t % 2 : random() % 5;
    }
  }
  expect_agrees(problem, Way::order);
}

// Keys of equal tokens in texts of their own are no less a collision.
static void test_collisions_between_texts() {
  Problem problem = problem_of(3, 2, 1);
  problem.n_sequences = 1;
  problem.tokens.assign(400, 1);
  problem.segments.resize(400);
  for (size_t t = 0; t < 400; ++t) problem.segments[t] = int64_t(t) / 20;
  expect_agrees(problem, Way::order_with_collisions);
}

int main() {
  for (int64_t ngram_size : {0, 1, 2, 4}) test_agrees_with_the_lists(ngram_size, 75, ngram_size);
  test_agrees_with_the_lists(3, 31, 5);
  test_agrees_with_the_lists(3, 1, 6);
  test_agrees_with_the_lists(2, 300, 7);
  test_long_text("rare", 1, true);
  test_long_text("period", 3, false);
  test_long_text("packed", 3, false);
  test_collisions_between_texts();
  return expect::exit_code();
}
