// repetition_candidates on CUDA. The kernel is in repetition.cuh.
#include "repetition.cuh"

#include <array>
#include <optional>
#include <tuple>

#include "../checks_repetition.h"
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
                      const Tensor& weights,                  // [4]
                      const Tensor& id_lists,                 // [n_excluded + n_eos]
                      const Tensor& ids,                      // [batch_size, n_tokens, n_slots]
                      const Tensor& candidate_weights,        // [batch_size, n_tokens, n_slots]
                      Stream stream) {
  RepetitionArguments<Weight> arguments{};
  arguments.tokens = token_matrix(tokens);
  arguments.targets = token_matrix(targets);
  if (segments) arguments.segments = token_matrix(*segments);
  arguments.weights = static_cast<const Weight*>(weights.const_data_ptr());
  arguments.weight_stride = weights.stride(0);
  arguments.excluded_ids = static_cast<const int32_t*>(id_lists.const_data_ptr());
  arguments.n_excluded = int64_t(options.excluded_ids.size());
  arguments.eos_ids = arguments.excluded_ids + arguments.n_excluded;
  arguments.n_eos = int64_t(options.eos_ids.size());
  arguments.n_sequences = tokens.size(0);
  arguments.n_tokens = tokens.size(1);
  arguments.vocab_size = options.vocab_size;
  arguments.ignore_index = options.ignore_index;
  arguments.immediate_threshold = options.immediate_threshold;
  arguments.ngram_size = options.ngram_size;
  arguments.ngram_window = options.ngram_window;
  arguments.ngram_slots = options.ngram_slots;
  arguments.min_sequence_length = options.min_sequence_length;
  arguments.tokens_include_row = options.tokens_include_row;
  arguments.immediate = options.immediate;
  arguments.ids = static_cast<int32_t*>(ids.mutable_data_ptr());
  arguments.candidate_weights = static_cast<Weight*>(candidate_weights.mutable_data_ptr());
  write_candidates(arguments, stream);
}

// sorted, without those that no token in the vocabulary equals
void keep_vocabulary(std::vector<int64_t>& ids, int64_t vocab_size) {
  const auto outside = [&](int64_t id) { return id < 0 || id >= vocab_size; };
  ids.erase(std::remove_if(ids.begin(), ids.end(), outside), ids.end());
  std::sort(ids.begin(), ids.end());
}

std::tuple<Tensor, Tensor> repetition_candidates_cuda(
    const Tensor& tokens,                   // [batch_size, n_tokens]
    const Tensor& targets,                  // [batch_size, n_tokens]
    const std::optional<Tensor>& segments,  // [batch_size or 1, n_tokens]
    const Tensor& weights,                  // [4]
    bool tokens_include_row, int64_t vocab_size, int64_t ignore_index, std::vector<int64_t> excluded_ids,
    bool immediate, int64_t immediate_threshold, int64_t ngram_size, int64_t ngram_window, int64_t ngram_slots,
    std::vector<int64_t> eos_ids, int64_t min_sequence_length) {
  keep_vocabulary(excluded_ids, vocab_size);
  const RepetitionOptions options{tokens_include_row, vocab_size,          ignore_index,       std::move(excluded_ids),
                                  immediate,          immediate_threshold, ngram_size,         ngram_window,
                                  ngram_slots,        std::move(eos_ids),  min_sequence_length};
  check_repetition_candidates(tokens, targets, segments, weights, options);

  const DeviceScope device(tokens);
  const std::array<int64_t, 3> shape{tokens.size(0), tokens.size(1), options.n_slots()};
  Tensor ids = torch::stable::new_empty(tokens, {shape.data(), shape.size()}, ScalarType::Int);
  Tensor candidate_weights = torch::stable::new_empty(weights, {shape.data(), shape.size()});
  std::vector<int32_t> lists(options.excluded_ids.begin(), options.excluded_ids.end());
  lists.insert(lists.end(), options.eos_ids.begin(), options.eos_ids.end());
  const int64_t n_listed = int64_t(lists.size());
  const Tensor id_lists = torch::stable::new_empty(tokens, {&n_listed, 1}, ScalarType::Int);
  if (ids.numel() > 0) store_ids(lists, static_cast<int32_t*>(id_lists.mutable_data_ptr()), device.stream());
  const auto write = weights.scalar_type() == ScalarType::Double ? write_candidates<double> : write_candidates<float>;
  write(options, tokens, targets, segments, weights, id_lists, ids, candidate_weights, device.stream());
  return {ids, candidate_weights};
}

}  // namespace
}  // namespace ava

AVA_CUDA_OPERATORS(m) { m.impl("repetition_candidates", TORCH_BOX(&ava::repetition_candidates_cuda)); }
