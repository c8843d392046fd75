// Argument checks of repetition_candidates.
#pragma once
#include <limits>
#include <optional>

#include "checks.h"
#include "repetition.h"

namespace ava {

inline void check_token_ids(const char* name, const Tensor& ids) {
  STD_TORCH_CHECK(ids.scalar_type() == ScalarType::Long || ids.scalar_type() == ScalarType::Int,
                  "repetition_candidates: expected ", name, " of type int64 or int32");
}

inline void check_repetition_candidates(const Tensor& tokens,                   // [batch_size, n_tokens]
                                        const Tensor& targets,                  // [batch_size, n_tokens]
                                        const std::optional<Tensor>& segments,  // [batch_size or 1, n_tokens]
                                        const Tensor& weights,                  // [4]
                                        const RepetitionOptions& options) {
  constexpr int64_t limit = std::numeric_limits<int32_t>::max();
  const char* op = "repetition_candidates";
  STD_TORCH_CHECK(tokens.dim() == 2, op, ": expected tokens of shape [batch_size, n_tokens], got ",
                  shape_string(tokens));
  STD_TORCH_CHECK(tokens.size(1) < limit, op, ": expected fewer than 2^31 - 1 tokens in a sequence, got ",
                  tokens.size(1));
  check_token_ids("tokens", tokens);
  check_token_ids("targets", targets);
  STD_TORCH_CHECK(targets.dim() == 2 && targets.size(0) == tokens.size(0) && targets.size(1) == tokens.size(1), op,
                  ": expected targets of shape ", shape_string(tokens), ", got ", shape_string(targets));
  STD_TORCH_CHECK(targets.device() == tokens.device(), op, ": expected tokens and targets on one device");
  if (segments) {
    check_token_ids("segments", *segments);
    STD_TORCH_CHECK(segments->dim() == 2 && (segments->size(0) == tokens.size(0) || segments->size(0) == 1) &&
                        segments->size(1) == tokens.size(1),
                    op, ": expected segments of shape ", shape_string(tokens), ", got ", shape_string(*segments));
    STD_TORCH_CHECK(segments->device() == tokens.device(), op, ": expected tokens and segments on one device");
  }
  STD_TORCH_CHECK(weights.dim() == 1 && weights.size(0) == 4, op, ": expected weights of shape [4], got ",
                  shape_string(weights));
  STD_TORCH_CHECK(weights.scalar_type() == ScalarType::Float || weights.scalar_type() == ScalarType::Double, op,
                  ": expected weights of type float32 or float64");
  STD_TORCH_CHECK(weights.device() == tokens.device(), op, ": expected tokens and weights on one device");
  STD_TORCH_CHECK(options.vocab_size > 0 && options.vocab_size <= limit, op, ": expected vocab_size in [1, 2^31), got ",
                  options.vocab_size);
  STD_TORCH_CHECK(options.immediate_threshold >= 1, op, ": expected immediate_threshold >= 1, got ",
                  options.immediate_threshold);
  STD_TORCH_CHECK(options.ngram_size >= 0, op, ": expected ngram_size >= 0, got ", options.ngram_size);
  STD_TORCH_CHECK(options.ngram_window >= 0, op, ": expected ngram_window >= 0, got ", options.ngram_window);
  STD_TORCH_CHECK(options.ngram_size == 0 || options.ngram_slots >= 1, op, ": expected ngram_slots >= 1, got ",
                  options.ngram_slots);
  for (int64_t eos : options.eos_ids)
    STD_TORCH_CHECK(eos >= 0 && eos < options.vocab_size, op,
                    ": expected eos_ids in [0, vocab_size = ", options.vocab_size, "), got ", eos);
}

}  // namespace ava
