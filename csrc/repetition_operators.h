// repetition_candidates, written once for every device: checks, options and outputs.
#pragma once
#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"
#include "new_tensor.h"
#include "repetition.h"

namespace ava {

inline void check_repetition_candidates(const Tensor& tokens,                   // [batch_size, n_tokens]
                                        const Tensor& targets,                  // [batch_size, n_tokens]
                                        const std::optional<Tensor>& segments,  // [batch_size or 1, n_tokens]
                                        const Tensor& weights,                  // [kRepetitionWeights]
                                        const RepetitionOptions& options) {
  constexpr int64_t limit = std::numeric_limits<int32_t>::max();
  const char* op = "repetition_candidates";
  AVA_CHECK(tokens.dim() == 2, op, ": expected tokens of shape [batch_size, n_tokens], got ", shape_string(tokens));
  AVA_CHECK(tokens.size(1) < limit, op, ": expected fewer than 2^31 - 1 tokens in a sequence, got ", tokens.size(1));
  index_type(op, "tokens", tokens);
  check_beside(op, "targets", targets, shape_of(tokens), index_type(op, "targets", targets), tokens);
  if (segments) {
    const bool is_for_all = segments->dim() == 2 && segments->size(0) == 1;
    const std::vector<int64_t> shape = {is_for_all ? 1 : tokens.size(0), tokens.size(1)};
    check_beside(op, "segments", *segments, shape, index_type(op, "segments", *segments), tokens);
  }
  AVA_CHECK(weights.scalar_type() == ScalarType::Float || weights.scalar_type() == ScalarType::Double, op,
            ": expected weights of type float32 or float64, got ", type_name(weights.scalar_type()));
  check_beside(op, "weights", weights, {kRepetitionWeights}, weights.scalar_type(), tokens);
  AVA_CHECK(options.vocab_size > 0 && options.vocab_size <= limit, op, ": expected vocab_size in [1, 2^31), got ",
            options.vocab_size);
  AVA_CHECK(options.immediate_repetition_threshold >= 1, op, ": expected immediate_repetition_threshold >= 1, got ",
            options.immediate_repetition_threshold);
  AVA_CHECK(options.ngram_size >= 0, op, ": expected ngram_size >= 0, got ", options.ngram_size);
  AVA_CHECK(options.ngram_window_size >= 0, op, ": expected ngram_window_size >= 0, got ", options.ngram_window_size);
  AVA_CHECK(options.ngram_size == 0 || options.ngram_slots >= 1, op, ": expected ngram_slots >= 1, got ",
            options.ngram_slots);
  for (int64_t eos : options.eos_ids)
    AVA_CHECK(eos >= 0 && eos < options.vocab_size, op, ": expected eos_ids in [0, vocab_size = ", options.vocab_size,
              "), got ", eos);
}

// `run` writes the candidates: run(options, tokens, targets, segments, weights, ids, candidate_weights).
template <auto run>
std::tuple<Tensor, Tensor> repetition_candidates(const Tensor& tokens,                   // [batch_size, n_tokens]
                                                 const Tensor& targets,                  // [batch_size, n_tokens]
                                                 const std::optional<Tensor>& segments,  // [batch_size or 1, n_tokens]
                                                 const Tensor& weights,                  // [kRepetitionWeights]
                                                 bool tokens_include_row, int64_t vocab_size, int64_t ignore_index,
                                                 std::optional<std::vector<int64_t>> repetition_allow_list,
                                                 bool use_immediate_repetition_penalty,
                                                 int64_t immediate_repetition_threshold, int64_t ngram_size,
                                                 int64_t ngram_window_size, int64_t ngram_slots,
                                                 std::optional<std::vector<int64_t>> eos_ids,
                                                 int64_t min_sequence_length) {
  RepetitionOptions options{tokens_include_row,
                            vocab_size,
                            ignore_index,
                            std::move(repetition_allow_list).value_or(std::vector<int64_t>{}),
                            use_immediate_repetition_penalty,
                            immediate_repetition_threshold,
                            ngram_size,
                            ngram_window_size,
                            ngram_slots,
                            std::move(eos_ids).value_or(std::vector<int64_t>{}),
                            min_sequence_length};
  check_repetition_candidates(tokens, targets, segments, weights, options);
  // sorted, and without those that no token in the vocabulary equals
  std::vector<int64_t>& allowed = options.repetition_allow_list;
  const auto outside = [&](int64_t id) { return id < 0 || id >= vocab_size; };
  allowed.erase(std::remove_if(allowed.begin(), allowed.end(), outside), allowed.end());
  std::sort(allowed.begin(), allowed.end());

  const std::vector<int64_t> shape{tokens.size(0), tokens.size(1), options.n_slots()};
  const Tensor ids = new_tensor(tokens, shape, ScalarType::Int),
               candidate_weights = new_tensor(weights, shape, weights.scalar_type());
  run(options, tokens, targets, segments, weights, ids, candidate_weights);
  return {ids, candidate_weights};
}

}  // namespace ava
