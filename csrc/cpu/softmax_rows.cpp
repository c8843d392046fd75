// The row family on the CPU: checks, outputs and threads. The arithmetic is in softmax_rows_core.h.
#include <algorithm>
#include <atomic>
#include <tuple>

#include "../checks_rows.h"
#include "../softmax_rows.h"
#include "capability.h"
#include "gradient_pool.h"
#include "softmax_rows_kernels.h"
#include "tensors.h"

namespace ava {
namespace {

const SoftmaxRowsKernels& kernels() {
#ifdef AVA_X86
  switch (cpu_capability()) {
    case CpuCapability::avx512: return softmax_rows_avx512;
    case CpuCapability::avx2: return softmax_rows_avx2;
    default: break;
  }
#endif
  return softmax_rows_portable;
}

int64_t bytes_of(ElementType type) { return type == ElementType::f64 ? 8 : type == ElementType::f32 ? 4 : 2; }

// Threads of torch's own pool, so that torch.set_num_threads holds here too, take a few rows at a time: rows that do
// not count cost little, and may all be in one place.
void for_rows(SoftmaxRowsKernel kernel, const SoftmaxRowsArguments& arguments) {
  if (arguments.n_rows == 0) return;
  const int64_t rows_at_once = std::max<int64_t>(1, (int64_t(1) << 18) / arguments.n_columns);
  const int64_t n_pieces = (arguments.n_rows + rows_at_once - 1) / rows_at_once;
  const int64_t n_threads = std::min<int64_t>(n_pieces, torch::stable::get_num_threads());
  std::atomic<int64_t> next_piece{0};
  const auto work = [&](int64_t, int64_t) {
    std::vector<char> scratch(sparse_scratch_bytes(arguments.n_ids));
    for (int64_t piece; (piece = next_piece.fetch_add(1)) < n_pieces;)
      kernel(arguments, piece * rows_at_once, std::min(arguments.n_rows, (piece + 1) * rows_at_once), scratch.data());
  };
  if (n_threads == 1)
    work(0, 1);
  else
    torch::stable::parallel_for(0, n_threads, 1, work);
}

// what all three operators are given
SoftmaxRowsArguments row_arguments(const char* op, const Tensor& logits, const Tensor& coefficients, int64_t flags,
                                   int64_t vocab_size) {
  check_logits(op, logits, vocab_size);
  check_tensor(op, "coefficients", coefficients, {kRowOptions}, accumulation_type(logits));
  SoftmaxRowsArguments arguments{};
  arguments.element_type = element_type(op, logits);
  arguments.vocab_size = vocab_size;
  arguments.n_columns = logits.size(logits.dim() - 1);
  arguments.n_rows = rows_of(logits);
  arguments.flags = flags;
  arguments.options = coefficients.const_data_ptr();
  arguments.logits = logits.const_data_ptr();
  arguments.logits_layout = layout_of(op, logits);
  return arguments;
}

// in torch an index that is out of range is an IndexError, which std::out_of_range becomes
void check_range(const char* op, const char* name, const Tensor& dense_ids, int64_t vocab_size, int64_t absent) {
  const int64_t n = dense_ids.numel();
  const bool wide = dense_ids.scalar_type() == ScalarType::Long;
  const auto* longs = static_cast<const int64_t*>(wide ? dense_ids.const_data_ptr() : nullptr);
  const auto* ints = static_cast<const int32_t*>(wide ? nullptr : dense_ids.const_data_ptr());
  for (int64_t i = 0; i < n; ++i) {
    const int64_t id = wide ? longs[i] : ints[i];
    if ((id < 0 || id >= vocab_size) && id != absent)
      throw std::out_of_range(std::string(op) + ": expected " + name + " in [0, " + std::to_string(vocab_size) +
                              ") or " + std::to_string(absent) + ", got " + std::to_string(id) + " at position " +
                              std::to_string(i));
  }
}

void write_gradient_to(const char* op, SoftmaxRowsArguments& arguments, const Tensor& grad_logits) {
  arguments.grad_logits = grad_logits.mutable_data_ptr();
  arguments.grad_layout = layout_of(op, grad_logits);
  // a gradient that will not be in the caches when it is wanted is written past them, which saves reading it first
  constexpr int64_t cached_bytes = int64_t(8) << 20;
  arguments.stream = arguments.grad_logits != arguments.logits &&
                     grad_logits.numel() * bytes_of(arguments.element_type) > cached_bytes;
}

struct RowLossOutputs {
  Tensor row_loss;          // [...]
  Tensor row_terms;         // [kRowTerms + n_groups, ...]
  Tensor grad_logits;       // [..., n_columns], or [0]
  Tensor statistics;        // [..., 6], or [0]
  Tensor row_coefficients;  // [..., 5 + n_candidates], or [0]
};

enum class Gradient { none, fused, split, in_place };

RowLossOutputs run_row_loss(const char* op,
                            const Tensor& logits,                            // [..., n_columns]
                            const Tensor& targets,                           // [...]
                            const Tensor& coefficients,                      // [kRowOptions]
                            const std::optional<Tensor>& row_weights,        // [...]
                            const std::optional<Tensor>& candidate_ids,      // [..., n_candidates]
                            const std::optional<Tensor>& candidate_weights,  // [..., n_candidates]
                            const std::vector<int64_t>& candidate_groups,    // sizes that add up to n_candidates
                            int64_t flags, int64_t vocab_size, int64_t ignore_index, Gradient gradient) {
  SoftmaxRowsArguments arguments = row_arguments(op, logits, coefficients, flags, vocab_size);
  const ScalarType real = accumulation_type(logits);
  const std::vector<int64_t> rows = rows_shape(logits);
  check_tensor(op, "targets", targets, rows, ScalarType::Long);
  if (row_weights) check_tensor(op, "row_weights", *row_weights, rows, real);
  check_ids(op, logits, candidate_ids);
  STD_TORCH_CHECK(candidate_ids.has_value() == candidate_weights.has_value(), op,
                  ": expected candidate_ids and candidate_weights together, got one of them");
  if (candidate_ids) {
    arguments.n_ids = candidate_ids->size(candidate_ids->dim() - 1);
    check_tensor(op, "candidate_weights", *candidate_weights, rows_shape(logits, arguments.n_ids), real);
  }
  int64_t in_groups = 0;
  for (const int64_t size : candidate_groups) in_groups += size;
  STD_TORCH_CHECK(in_groups == arguments.n_ids, op, ": expected candidate_groups to add up to ", arguments.n_ids,
                  ", got ", in_groups);

  const Tensor dense_targets = torch::stable::contiguous(targets);
  check_range(op, "targets", dense_targets, vocab_size, ignore_index);
  arguments.targets = static_cast<const int64_t*>(dense_targets.const_data_ptr());
  arguments.ignore_index = ignore_index;
  std::optional<Tensor> dense_weights, dense_ids, dense_id_weights;
  if (row_weights) {
    dense_weights = torch::stable::contiguous(*row_weights);
    arguments.row_weights = dense_weights->const_data_ptr();
  }
  if (candidate_ids) {
    dense_ids = torch::stable::contiguous(*candidate_ids),
    dense_id_weights = torch::stable::contiguous(*candidate_weights);
    check_range(op, "candidate_ids", *dense_ids, vocab_size, -1);
    arguments.ids = static_cast<const int32_t*>(dense_ids->const_data_ptr());
    arguments.id_values = dense_id_weights->const_data_ptr();
  }
  arguments.group_sizes = candidate_groups.data();
  arguments.n_groups = int64_t(candidate_groups.size());

  std::vector<int64_t> terms_shape = rows;
  terms_shape.insert(terms_shape.begin(), kRowTerms + arguments.n_groups);
  const bool split = gradient == Gradient::split;
  RowLossOutputs outputs{empty_tensor(rows, real), empty_tensor(terms_shape, real),
                         gradient == Gradient::in_place ? logits
                         : gradient == Gradient::fused
                             ? pooled_empty(shape_of(logits), logits.scalar_type(), bytes_of(arguments.element_type))
                             : empty_tensor({0}, logits.scalar_type()),
                         split ? empty_tensor(rows_shape(logits, 6), real) : empty_tensor({0}, real),
                         split ? empty_tensor(rows_shape(logits, 5 + arguments.n_ids), real) : empty_tensor({0}, real)};
  arguments.row_loss = outputs.row_loss.mutable_data_ptr();
  arguments.row_terms = outputs.row_terms.mutable_data_ptr();
  if (split) {
    arguments.statistics = outputs.statistics.mutable_data_ptr();
    arguments.row_coefficients = outputs.row_coefficients.mutable_data_ptr();
  } else if (gradient != Gradient::none) {
    write_gradient_to(op, arguments, outputs.grad_logits);
  }
  for_rows(kernels().row_loss, arguments);
  return outputs;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> row_loss(
    const Tensor& logits, const Tensor& targets, const Tensor& coefficients, std::optional<Tensor> row_weights,
    std::optional<Tensor> candidate_ids, std::optional<Tensor> candidate_weights, std::vector<int64_t> candidate_groups,
    int64_t flags, int64_t vocab_size, int64_t ignore_index, bool with_gradient, bool with_statistics) {
  STD_TORCH_CHECK(!(with_gradient && with_statistics), "row_loss: expected with_gradient or with_statistics, got both");
  const Gradient gradient = with_gradient ? Gradient::fused : with_statistics ? Gradient::split : Gradient::none;
  const RowLossOutputs out =
      run_row_loss("row_loss", logits, targets, coefficients, row_weights, candidate_ids, candidate_weights,
                   candidate_groups, flags, vocab_size, ignore_index, gradient);
  return {out.row_loss, out.row_terms, out.grad_logits, out.statistics, out.row_coefficients};
}

std::tuple<Tensor, Tensor> row_loss_(const Tensor& logits, const Tensor& targets, const Tensor& coefficients,
                                     std::optional<Tensor> row_weights, std::optional<Tensor> candidate_ids,
                                     std::optional<Tensor> candidate_weights, std::vector<int64_t> candidate_groups,
                                     int64_t flags, int64_t vocab_size, int64_t ignore_index) {
  const RowLossOutputs out =
      run_row_loss("row_loss_", logits, targets, coefficients, row_weights, candidate_ids, candidate_weights,
                   candidate_groups, flags, vocab_size, ignore_index, Gradient::in_place);
  return {out.row_loss, out.row_terms};
}

std::tuple<Tensor, Tensor, Tensor> row_statistics(
    const Tensor& logits,            // [..., n_columns]
    std::optional<Tensor> ids,       // [..., n_ids]
    std::optional<Tensor> row_mask,  // [...]: rows to measure; the others give 0
    const Tensor& coefficients,      // [kRowOptions]
    int64_t flags, int64_t vocab_size) {
  SoftmaxRowsArguments arguments = row_arguments("row_statistics", logits, coefficients, flags | kEntropy, vocab_size);
  const ScalarType real = accumulation_type(logits);
  check_ids("row_statistics", logits, ids);
  std::optional<Tensor> dense_ids;
  if (ids) {
    dense_ids = torch::stable::contiguous(*ids);
    check_range("row_statistics", "ids", *dense_ids, vocab_size, -1);
    arguments.n_ids = ids->size(ids->dim() - 1);
    arguments.ids = static_cast<const int32_t*>(dense_ids->const_data_ptr());
  }
  if (row_mask) {
    check_tensor("row_statistics", "row_mask", *row_mask, rows_shape(logits), ScalarType::Bool);
    row_mask = torch::stable::contiguous(*row_mask);
    arguments.row_mask = static_cast<const bool*>(row_mask->const_data_ptr());
  }
  std::vector<int64_t> summaries_shape = rows_shape(logits);
  summaries_shape.insert(summaries_shape.begin(), 4);
  Tensor statistics = empty_tensor(rows_shape(logits, 6), real),
         log_probs = empty_tensor(rows_shape(logits, arguments.n_ids), real),
         summaries = empty_tensor(summaries_shape, real);
  arguments.statistics = statistics.mutable_data_ptr();
  arguments.id_log_probs = log_probs.mutable_data_ptr();
  arguments.summaries = summaries.mutable_data_ptr();
  for_rows(kernels().row_statistics, arguments);
  return {statistics, log_probs, summaries};
}

void run_row_gradient(const char* op,
                      const Tensor& logits,              // [..., n_columns]
                      const Tensor& statistics,          // [..., 6]
                      const Tensor& row_coefficients,    // [..., 4 + n_ids]
                      const std::optional<Tensor>& ids,  // [..., n_ids]
                      const Tensor& coefficients,        // [kRowOptions]
                      int64_t flags, int64_t vocab_size,
                      const Tensor& grad_logits) {  // [..., n_columns]; may be the logits
  SoftmaxRowsArguments arguments = row_arguments(op, logits, coefficients, flags, vocab_size);
  const ScalarType real = accumulation_type(logits);
  check_ids(op, logits, ids);
  arguments.n_ids = ids ? ids->size(ids->dim() - 1) : 0;
  check_tensor(op, "statistics", statistics, rows_shape(logits, 6), real);
  check_tensor(op, "row_coefficients", row_coefficients, rows_shape(logits, 4 + arguments.n_ids), real);
  const Tensor dense_statistics = torch::stable::contiguous(statistics),
               dense = torch::stable::contiguous(row_coefficients);
  std::optional<Tensor> dense_ids;
  if (ids) {
    dense_ids = torch::stable::contiguous(*ids);
    check_range(op, "ids", *dense_ids, vocab_size, -1);
    arguments.ids = static_cast<const int32_t*>(dense_ids->const_data_ptr());
  }
  arguments.statistics = const_cast<void*>(dense_statistics.const_data_ptr());
  arguments.row_coefficients = const_cast<void*>(dense.const_data_ptr());
  write_gradient_to(op, arguments, grad_logits);
  for_rows(kernels().row_gradient, arguments);
}

Tensor row_gradient(const Tensor& logits, const Tensor& statistics, const Tensor& row_coefficients,
                    std::optional<Tensor> ids, const Tensor& coefficients, int64_t flags, int64_t vocab_size) {
  check_logits("row_gradient", logits, vocab_size);
  Tensor grad_logits =
      pooled_empty(shape_of(logits), logits.scalar_type(), bytes_of(element_type("row_gradient", logits)));
  run_row_gradient("row_gradient", logits, statistics, row_coefficients, ids, coefficients, flags, vocab_size,
                   grad_logits);
  return grad_logits;
}

void row_gradient_(const Tensor& logits, const Tensor& statistics, const Tensor& row_coefficients,
                   std::optional<Tensor> ids, const Tensor& coefficients, int64_t flags, int64_t vocab_size) {
  run_row_gradient("row_gradient_", logits, statistics, row_coefficients, ids, coefficients, flags, vocab_size, logits);
}

void scale_rows_(const Tensor& rows,       // [..., n_columns], last stride 1
                 const Tensor& factors) {  // [...]
  check_logits("scale_rows_", rows, rows.dim() ? rows.size(rows.dim() - 1) : 1);
  check_tensor("scale_rows_", "factors", factors, rows_shape(rows), accumulation_type(rows));
  const Tensor dense_factors = torch::stable::contiguous(factors);
  SoftmaxRowsArguments arguments{};
  arguments.element_type = element_type("scale_rows_", rows);
  arguments.n_columns = rows.size(rows.dim() - 1);
  arguments.n_rows = rows_of(rows);
  arguments.row_weights = dense_factors.const_data_ptr();
  arguments.grad_logits = rows.mutable_data_ptr();
  arguments.grad_layout = layout_of("scale_rows_", rows);
  for_rows(kernels().scale_rows, arguments);
}

}  // namespace
}  // namespace ava

STABLE_TORCH_LIBRARY_IMPL(ava_ext, CPU, m) {
  m.impl("row_loss", TORCH_BOX(&ava::row_loss));
  m.impl("row_loss_", TORCH_BOX(&ava::row_loss_));
  m.impl("row_statistics", TORCH_BOX(&ava::row_statistics));
  m.impl("row_gradient", TORCH_BOX(&ava::row_gradient));
  m.impl("row_gradient_", TORCH_BOX(&ava::row_gradient_));
  m.impl("scale_rows_", TORCH_BOX(&ava::scale_rows_));
}
