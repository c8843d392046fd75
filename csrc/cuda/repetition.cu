// repetition_candidates on CUDA: few tokens by one kernel that reads (repetition.cuh), more in linear time
// (repetition_text.cuh, repetition_order.cuh).
#include "repetition.cuh"

#include <optional>

#include "../repetition_operators.h"
#include "launch.h"
#include "repetition_order.cuh"

namespace ava {
namespace {

TokenMatrix token_matrix(const Tensor& tokens) {  // [batch_size or 1, n_tokens]
  return {tokens.const_data_ptr(), tokens.scalar_type() == ScalarType::Int, tokens.size(0) == 1 ? 0 : tokens.stride(0),
          tokens.stride(1)};
}

// Tokens that the rows may read one by one, for each multiprocessor: what takes no longer than the linear way's launches.
constexpr double kMostReads = 1 << 19;

template <class Weight>
void write_candidates_of_device(RepetitionArguments<Weight> arguments, const Tensor& tokens,
                                const DeviceScope& device) {
  const int64_t n_rows = tokens.numel();
  if (n_rows == 0 || arguments.n_slots() == 0) return;
  const auto may_read = [&](int64_t n_tokens) {
    return double(n_rows) * double(n_tokens) <= kMostReads * device.limits().n_multiprocessors;
  };
  if (may_read(arguments.n_tokens)) return write_candidates(arguments, device.stream());

  const auto new_ints = [&](int64_t rows, int64_t columns) {
    return new_tensor(tokens, {rows, columns}, ScalarType::Int);
  };
  const auto ints = [](const Tensor& tensor) { return static_cast<int32_t*>(tensor.mutable_data_ptr()); };
  const Tensor memory = new_ints(kTextFacts, n_rows);
  const TextFacts facts{ints(memory), ints(memory) + n_rows, ints(memory) + 2 * n_rows};
  write_text_facts(arguments, facts, device.stream());
  write_run_slots(arguments, facts, device.stream());
  if (arguments.ngram_size == 0) return;
  arguments.reads_runs = false;
  const int64_t window = arguments.ngram_window_size > 0 ? arguments.ngram_window_size : arguments.n_tokens;
  if (arguments.ngram_slots > kMostSlotsByOrder || may_read(std::min(window, arguments.n_tokens)))
    return write_candidates(arguments, device.stream());

  const Tensor hashes = new_tensor(tokens, {n_rows}, ScalarType::Long);
  RowOrder order{};
  order.n_rows = n_rows;
  order.hash_bits = ~uint64_t(0);
  order.hashes = static_cast<int64_t*>(hashes.mutable_data_ptr());
  write_key_hashes(arguments, facts, order, device.stream());
  const auto [sorted, rows] = sort_keys(hashes);
  order.sorted = static_cast<const int64_t*>(sorted.const_data_ptr());
  order.rows = static_cast<const int64_t*>(rows.const_data_ptr());
  const int64_t n_lists = order.n_chunks() + order.n_spans();
  const Tensor list_tokens = new_ints(n_lists, 32), list_positions = new_ints(n_lists, 32),
               of_lists = new_ints(2, n_lists);
  order.tokens = ints(list_tokens);
  order.positions = ints(list_positions);
  order.lengths = ints(of_lists);
  order.collisions = ints(of_lists) + n_lists;
  write_ngram_slots(arguments, facts, order, device.stream());
  arguments.collisions = order.collisions + order.n_chunks();
  arguments.n_collisions = order.n_spans();
  write_candidates(arguments, device.stream());
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
                      const DeviceScope& device) {
  RepetitionArguments<Weight> arguments{};
  arguments.tokens = token_matrix(tokens);
  arguments.targets = token_matrix(targets);
  if (segments) arguments.segments = token_matrix(*segments);
  arguments.weights = static_cast<const Weight*>(weights.const_data_ptr());
  arguments.weight_stride = weights.stride(0);
  arguments.n_sequences = tokens.size(0);
  arguments.n_tokens = tokens.size(1);
  arguments.set_options(options, static_cast<const int32_t*>(id_lists.const_data_ptr()));
  arguments.ids = static_cast<int32_t*>(ids.mutable_data_ptr());
  arguments.candidate_weights = static_cast<Weight*>(candidate_weights.mutable_data_ptr());
  write_candidates_of_device(arguments, tokens, device);
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
  write(options, tokens, targets, segments, weights, id_lists, ids, candidate_weights, device);
}

}  // namespace
}  // namespace ava

AVA_CUDA_OPERATORS(m) {
  m.impl("repetition_candidates", AVA_BOX(&ava::repetition_candidates<ava::run_repetition_candidates>));
}
