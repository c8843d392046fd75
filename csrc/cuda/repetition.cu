// repetition_candidates on CUDA. The kernel is in repetition.cuh.
#include "repetition.cuh"

#include <optional>

#include "../repetition_operators.h"
#include "launch.h"

namespace ava {
namespace {

TokenMatrix token_matrix(const Tensor& tokens) {  // [batch_size or 1, n_tokens]
  return {tokens.const_data_ptr(), tokens.scalar_type() == ScalarType::Int, tokens.size(0) == 1 ? 0 : tokens.stride(0),
          tokens.stride(1)};
}

template <class Weight>
void write_candidates(const RepetitionOptions& options,
                      const Tensor& tokens,                   // [batch_size, n_tokens]
                      const Tensor& targets,                  // [batch_size, n_tokens]
                      const std::optional<Tensor>& segments,  // [batch_size or 1, n_tokens]
                      const Tensor& weights,                  // [kRepetitionWeights]
                      const Tensor& id_lists,                 // [n_allowed + n_eos]
                      const Tensor& ids,                      // [batch_size, n_tokens, n_slots]
                      const Tensor& candidate_weights,        // [batch_size, n_tokens, n_slots]
                      Stream stream) {
  RepetitionArguments<Weight> arguments{};
  arguments.tokens = token_matrix(tokens);
  arguments.targets = token_matrix(targets);
  if (segments) arguments.segments = token_matrix(*segments);
  arguments.weights = static_cast<const Weight*>(weights.const_data_ptr());
  arguments.weight_stride = weights.stride(0);
  arguments.repetition_allow_list = static_cast<const int32_t*>(id_lists.const_data_ptr());
  arguments.n_allowed = int64_t(options.repetition_allow_list.size());
  arguments.eos_ids = arguments.repetition_allow_list + arguments.n_allowed;
  arguments.n_eos = int64_t(options.eos_ids.size());
  arguments.n_sequences = tokens.size(0);
  arguments.n_tokens = tokens.size(1);
  arguments.vocab_size = options.vocab_size;
  arguments.ignore_index = options.ignore_index;
  arguments.immediate_repetition_threshold = options.immediate_repetition_threshold;
  arguments.ngram_size = options.ngram_size;
  arguments.ngram_window_size = options.ngram_window_size;
  arguments.ngram_slots = options.ngram_slots;
  arguments.min_sequence_length = options.min_sequence_length;
  arguments.tokens_include_row = options.tokens_include_row;
  arguments.use_immediate_repetition_penalty = options.use_immediate_repetition_penalty;
  arguments.ids = static_cast<int32_t*>(ids.mutable_data_ptr());
  arguments.candidate_weights = static_cast<Weight*>(candidate_weights.mutable_data_ptr());
  write_candidates(arguments, stream);
}

void run_repetition_candidates(const RepetitionOptions& options,
                               const Tensor& tokens,                   // [batch_size, n_tokens]
                               const Tensor& targets,                  // [batch_size, n_tokens]
                               const std::optional<Tensor>& segments,  // [batch_size or 1, n_tokens]
                               const Tensor& weights,                  // [kRepetitionWeights]
                               const Tensor& ids,                      // [batch_size, n_tokens, n_slots]
                               const Tensor& candidate_weights) {      // [batch_size, n_tokens, n_slots]
  const DeviceScope device(tokens);
  std::vector<int32_t> lists(options.repetition_allow_list.begin(), options.repetition_allow_list.end());
  lists.insert(lists.end(), options.eos_ids.begin(), options.eos_ids.end());
  const Tensor id_lists = new_tensor(tokens, {int64_t(lists.size())}, ScalarType::Int);
  if (ids.numel() > 0) store_ids(lists, static_cast<int32_t*>(id_lists.mutable_data_ptr()), device.stream());
  const auto write = weights.scalar_type() == ScalarType::Double ? write_candidates<double> : write_candidates<float>;
  write(options, tokens, targets, segments, weights, id_lists, ids, candidate_weights, device.stream());
}

}  // namespace
}  // namespace ava

AVA_CUDA_OPERATORS(m) {
  m.impl("repetition_candidates", AVA_BOX(&ava::repetition_candidates<ava::run_repetition_candidates>));
}
