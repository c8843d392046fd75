// The row family on CUDA: checks, outputs and launches, as csrc/cpu/softmax_rows.cpp has them. Ids out of range are a
// device assert of the kernels, as in torch: nothing here waits for the device.
#include <tuple>

#include "../checks_rows.h"
#include "launch.h"
#include "softmax_rows_kernels.h"

namespace ava {
namespace {

constexpr int64_t kMostIds = 1024;  // for a row; they wait in shared memory

const SoftmaxRowsLaunchers& launchers(ElementType type) {
  switch (type) {
    case ElementType::f32: return softmax_rows_float32;
    case ElementType::bf16: return softmax_rows_bfloat16;
    case ElementType::f16: return softmax_rows_float16;
    default: return softmax_rows_float64;
  }
}

void check_device(const char* op, const char* name, const Tensor& tensor, const Tensor& logits) {
  STD_TORCH_CHECK(tensor.device() == logits.device(), op, ": expected ", name, " on the device of the logits");
}
// this shape and type, and where the logits are
void check_beside(const char* op, const char* name, const Tensor& tensor, const std::vector<int64_t>& shape,
                  ScalarType type, const Tensor& logits) {
  check_tensor(op, name, tensor, shape, type);
  check_device(op, name, tensor, logits);
}

// What every operator is given. Keeps contiguous copies alive until the launch.
struct RowCall {
  const char* op;
  const Tensor& logits;  // [..., n_columns]
  RowArguments arguments{};
  std::vector<Tensor> copies;

  RowCall(const char* op, const Tensor& logits, int64_t vocab_size) : op(op), logits(logits) {
    check_logits(op, logits, vocab_size);
    const int64_t n_rows = rows_of(logits), n_columns = logits.size(logits.dim() - 1);
    STD_TORCH_CHECK(n_rows < int64_t(1) << 31, op, ": expected fewer than 2^31 rows, got ", n_rows);
    STD_TORCH_CHECK(n_columns < int64_t(1) << 28, op, ": expected fewer than 2^28 columns, got ", n_columns);
    arguments.n_rows = n_rows;
    arguments.n_columns = int32_t(n_columns);
    arguments.vocab_size = int32_t(vocab_size);
    arguments.logits = logits.const_data_ptr();
    arguments.logits_layout = layout_of(op, logits);
  }
  void set_options(const Tensor& coefficients,  // [kRowOptions]
                   int64_t flags) {
    check_beside(op, "coefficients", coefficients, {kRowOptions}, accumulation_type(logits), logits);
    arguments.options = dense(coefficients);
    arguments.flags = int32_t(flags);
  }
  void set_ids(const std::optional<Tensor>& ids) {  // [..., n_ids]
    check_ids(op, logits, ids);
    if (!ids) return;
    check_device(op, "ids", *ids, logits);
    const int64_t n_ids = ids->size(ids->dim() - 1);
    STD_TORCH_CHECK(n_ids <= kMostIds, op, ": expected at most ", kMostIds, " ids for a row, got ", n_ids);
    arguments.n_ids = int32_t(n_ids);
    arguments.ids = static_cast<const int32_t*>(dense(*ids));
  }
  void set_gradient(const Tensor& grad_logits) {  // [..., n_columns]; may be the logits
    arguments.grad_logits = grad_logits.mutable_data_ptr();
    arguments.grad_layout = layout_of(op, grad_logits);
  }
  const void* dense(const Tensor& tensor) {
    copies.push_back(torch::stable::contiguous(tensor));
    return copies.back().const_data_ptr();
  }
  Tensor new_tensor(const std::vector<int64_t>& shape, ScalarType type) const {
    return torch::stable::new_empty(logits, shape, type);
  }
  Tensor new_gradient() const { return new_tensor(shape_of(logits), logits.scalar_type()); }
  void run(SoftmaxRowsLaunchers::Launcher SoftmaxRowsLaunchers::* kernel, const DeviceScope& device) const {
    if (arguments.n_rows == 0) return;
    (launchers(element_type(op, logits)).*kernel)(op, arguments, device.limits(), device.stream());
  }
};

struct RowLossOutputs {
  Tensor row_loss;          // [...]
  Tensor row_terms;         // [kRowTerms + n_groups, ...]
  Tensor grad_logits;       // [..., n_columns], or [0]
  Tensor statistics;        // [..., 6], or [0]
  Tensor row_coefficients;  // [..., 5 + n_candidates], or [0]
};

enum class Gradient { none, fused, split, in_place };

void set_groups(RowArguments& arguments, const char* op, const std::vector<int64_t>& candidate_groups) {
  int64_t in_groups = 0;
  for (const int64_t size : candidate_groups) in_groups += size;
  STD_TORCH_CHECK(in_groups == arguments.n_ids, op, ": expected candidate_groups to add up to ", arguments.n_ids,
                  ", got ", in_groups);
  STD_TORCH_CHECK(candidate_groups.size() <= kMostGroups, op, ": expected at most ", kMostGroups,
                  " groups of candidates, got ", candidate_groups.size());
  for (const int64_t size : candidate_groups) arguments.group_sizes[arguments.n_groups++] = int32_t(size);
}

RowLossOutputs run_row_loss(const char* op,
                            const Tensor& logits,                            // [..., n_columns]
                            const Tensor& targets,                           // [...]
                            const Tensor& coefficients,                      // [kRowOptions]
                            const std::optional<Tensor>& row_weights,        // [...]
                            const std::optional<Tensor>& candidate_ids,      // [..., n_candidates]
                            const std::optional<Tensor>& candidate_weights,  // [..., n_candidates]
                            const std::vector<int64_t>& candidate_groups,    // sizes that add up to n_candidates
                            int64_t flags, int64_t vocab_size, int64_t ignore_index, Gradient gradient) {
  RowCall call(op, logits, vocab_size);
  RowArguments& arguments = call.arguments;
  const ScalarType real = accumulation_type(logits);
  const std::vector<int64_t> rows = rows_shape(logits);
  call.set_options(coefficients, flags);
  check_beside(op, "targets", targets, rows, ScalarType::Long, logits);
  arguments.targets = static_cast<const int64_t*>(call.dense(targets));
  arguments.ignore_index = ignore_index;
  if (row_weights) {
    check_beside(op, "row_weights", *row_weights, rows, real, logits);
    arguments.row_weights = call.dense(*row_weights);
  }
  call.set_ids(candidate_ids);
  STD_TORCH_CHECK(candidate_ids.has_value() == candidate_weights.has_value(), op,
                  ": expected candidate_ids and candidate_weights together, got one of them");
  if (candidate_ids) {
    check_beside(op, "candidate_weights", *candidate_weights, rows_shape(logits, arguments.n_ids), real, logits);
    arguments.id_values = call.dense(*candidate_weights);
  }
  set_groups(arguments, op, candidate_groups);

  const DeviceScope device(logits);  // mixed devices have been found by now
  std::vector<int64_t> terms_shape = rows;
  terms_shape.insert(terms_shape.begin(), kRowTerms + arguments.n_groups);
  const bool is_split = gradient == Gradient::split;
  const std::vector<int64_t> none{0};
  const RowLossOutputs outputs{call.new_tensor(rows, real), call.new_tensor(terms_shape, real),
                               gradient == Gradient::in_place ? logits
                               : gradient == Gradient::fused  ? call.new_gradient()
                                                              : call.new_tensor(none, logits.scalar_type()),
                               call.new_tensor(is_split ? rows_shape(logits, 6) : none, real),
                               call.new_tensor(is_split ? rows_shape(logits, 5 + arguments.n_ids) : none, real)};
  arguments.row_loss = outputs.row_loss.mutable_data_ptr();
  arguments.row_terms = outputs.row_terms.mutable_data_ptr();
  if (is_split) {
    arguments.statistics = outputs.statistics.mutable_data_ptr();
    arguments.row_coefficients = outputs.row_coefficients.mutable_data_ptr();
  } else if (gradient != Gradient::none) {
    call.set_gradient(outputs.grad_logits);
  }
  call.run(&SoftmaxRowsLaunchers::row_loss, device);
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
  const char* const op = "row_statistics";
  RowCall call(op, logits, vocab_size);
  RowArguments& arguments = call.arguments;
  const ScalarType real = accumulation_type(logits);
  call.set_options(coefficients, flags | kEntropy);
  call.set_ids(ids);
  if (row_mask) {
    check_beside(op, "row_mask", *row_mask, rows_shape(logits), ScalarType::Bool, logits);
    arguments.row_mask = static_cast<const bool*>(call.dense(*row_mask));
  }
  const DeviceScope device(logits);
  std::vector<int64_t> summaries_shape = rows_shape(logits);
  summaries_shape.insert(summaries_shape.begin(), 4);
  Tensor statistics = call.new_tensor(rows_shape(logits, 6), real),
         log_probs = call.new_tensor(rows_shape(logits, arguments.n_ids), real),
         summaries = call.new_tensor(summaries_shape, real);
  arguments.statistics = statistics.mutable_data_ptr();
  arguments.id_log_probs = log_probs.mutable_data_ptr();
  arguments.summaries = summaries.mutable_data_ptr();
  call.run(&SoftmaxRowsLaunchers::row_loss, device);
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
  RowCall call(op, logits, vocab_size);
  RowArguments& arguments = call.arguments;
  const ScalarType real = accumulation_type(logits);
  call.set_options(coefficients, flags);
  call.set_ids(ids);
  check_beside(op, "statistics", statistics, rows_shape(logits, 6), real, logits);
  check_beside(op, "row_coefficients", row_coefficients, rows_shape(logits, 4 + arguments.n_ids), real, logits);
  arguments.statistics = const_cast<void*>(call.dense(statistics));
  arguments.row_coefficients = const_cast<void*>(call.dense(row_coefficients));
  call.set_gradient(grad_logits);
  const DeviceScope device(logits);
  call.run(&SoftmaxRowsLaunchers::row_gradient, device);
}

Tensor row_gradient(const Tensor& logits, const Tensor& statistics, const Tensor& row_coefficients,
                    std::optional<Tensor> ids, const Tensor& coefficients, int64_t flags, int64_t vocab_size) {
  Tensor grad_logits = RowCall("row_gradient", logits, vocab_size).new_gradient();
  run_row_gradient("row_gradient", logits, statistics, row_coefficients, ids, coefficients, flags, vocab_size,
                   grad_logits);
  return grad_logits;
}

void row_gradient_(const Tensor& logits, const Tensor& statistics, const Tensor& row_coefficients,
                   std::optional<Tensor> ids, const Tensor& coefficients, int64_t flags, int64_t vocab_size) {
  run_row_gradient("row_gradient_", logits, statistics, row_coefficients, ids, coefficients, flags, vocab_size, logits);
}

// Returns at once on the device where all factors are 1: the host never knows them.
void scale_rows_(const Tensor& rows,       // [..., n_columns], last stride 1
                 const Tensor& factors) {  // [...]
  RowCall call("scale_rows_", rows, rows.dim() ? rows.size(rows.dim() - 1) : 1);
  check_beside("scale_rows_", "factors", factors, rows_shape(rows), accumulation_type(rows), rows);
  const DeviceScope device(rows);
  call.arguments.row_weights = call.dense(factors);
  call.set_gradient(rows);
  call.run(&SoftmaxRowsLaunchers::scale_rows, device);
}

}  // namespace
}  // namespace ava

AVA_CUDA_OPERATORS(m) {
  m.impl("row_loss", TORCH_BOX(&ava::row_loss));
  m.impl("row_loss_", TORCH_BOX(&ava::row_loss_));
  m.impl("row_statistics", TORCH_BOX(&ava::row_statistics));
  m.impl("row_gradient", TORCH_BOX(&ava::row_gradient));
  m.impl("row_gradient_", TORCH_BOX(&ava::row_gradient_));
  m.impl("scale_rows_", TORCH_BOX(&ava::scale_rows_));
}
