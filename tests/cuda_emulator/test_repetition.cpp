// The CUDA kernel of repetition candidates against the lists of csrc/repetition.h, for which other tests vouch.
#include <random>
#include <vector>

#include "../../csrc/cuda/repetition.cuh"
#include "schedules.h"

using namespace ava;

static RepetitionArguments<float> arguments_of(const RepetitionOptions& options,
                                               const std::vector<int64_t>& tokens,  // [n_sequences, n_tokens]
                                               int64_t n_sequences, const std::vector<float>& weights,
                                               const std::vector<int32_t>& lists) {
  const int64_t n_tokens = int64_t(tokens.size()) / n_sequences;
  RepetitionArguments<float> arguments{};
  arguments.tokens = arguments.targets = {tokens.data(), false, n_tokens, 1};
  arguments.weights = weights.data();
  arguments.weight_stride = 1;
  arguments.repetition_allow_list = lists.data();
  arguments.n_allowed = int64_t(options.repetition_allow_list.size());
  arguments.eos_ids = lists.data() + arguments.n_allowed;
  arguments.n_eos = int64_t(options.eos_ids.size());
  arguments.n_sequences = n_sequences;
  arguments.n_tokens = n_tokens;
  arguments.vocab_size = options.vocab_size;
  arguments.ignore_index = options.ignore_index;
  arguments.immediate_repetition_threshold = options.immediate_repetition_threshold;
  arguments.ngram_size = options.ngram_size;
  arguments.ngram_window_size = options.ngram_window_size;
  arguments.ngram_slots = options.ngram_slots;
  arguments.min_sequence_length = options.min_sequence_length;
  arguments.use_immediate_repetition_penalty = options.use_immediate_repetition_penalty;
  return arguments;
}

static void test_agrees_with_the_lists(int64_t ngram_size, int64_t n_tokens, uint64_t seed) {
  constexpr int64_t n_sequences = 2;
  std::mt19937_64 random(seed);
  RepetitionOptions options;
  options.vocab_size = 5;
  options.repetition_allow_list = {2};
  options.use_immediate_repetition_penalty = true;
  options.ngram_size = ngram_size;
  options.ngram_slots = 3;
  options.ngram_window_size = seed % 2 ? 0 : 50;
  options.eos_ids = {0};
  options.min_sequence_length = 40;
  std::vector<int64_t> tokens(n_sequences * n_tokens);
  for (int64_t& token : tokens) token = random() % 12 == 0 ? options.ignore_index : int64_t(random() % 5);
  const std::vector<float> weights = {0.5f, 1.5f, 0.05f, 0.1f};

  const size_t n_slots = options.n_slots(), n_outputs = tokens.size() * n_slots;
  std::vector<int32_t> expected_ids(n_outputs);
  std::vector<float> expected_weights(n_outputs);
  FollowerLists<> lists;
  for (int64_t sequence = 0; sequence < n_sequences; ++sequence) {
    const int64_t* const text = tokens.data() + sequence * n_tokens;
    const size_t first = sequence * n_tokens * n_slots;
    segment_candidates<float>(options, {0.5, 1.5, 0.05f, 0.1f}, text, text, n_tokens, lists,
                              expected_ids.data() + first, expected_weights.data() + first);
  }
  cuda_emulator::under_every_schedule([&] {
    std::vector<int32_t> listed(2), ids(n_outputs);
    std::vector<float> candidate_weights(n_outputs);
    store_ids({2, 0}, listed.data(), nullptr);
    RepetitionArguments<float> arguments = arguments_of(options, tokens, n_sequences, weights, listed);
    arguments.ids = ids.data();
    arguments.candidate_weights = candidate_weights.data();
    write_candidates(arguments, nullptr);
    EXPECT(ids == expected_ids);
    for (size_t i = 0; i < n_outputs; ++i) EXPECT_CLOSE(candidate_weights[i], expected_weights[i], 1e-6);
  });
}

int main() {
  for (int64_t ngram_size : {0, 1, 2, 4}) test_agrees_with_the_lists(ngram_size, 75, ngram_size);
  test_agrees_with_the_lists(3, 31, 5);
  test_agrees_with_the_lists(3, 1, 6);
  return expect::exit_code();
}
