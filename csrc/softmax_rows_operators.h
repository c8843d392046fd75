// The row family's operators, written once for every device: checks, outputs, and which kernel they go to.
//
// A Device, in cpu/softmax_rows.cpp and cuda/softmax_rows.cu, brings what differs:
//
//   Arguments, Kernels     what its kernels are given, and the table of them: row_loss, row_statistics, row_gradient,
//                          scale_rows
//   check_size(op, n_rows, n_columns), check_n_ids(op, n_ids)     what it cannot take
//   check_targets(call), set_ids(call, name, ids)     the ids are dense, int32 or int64. What is out of range in a row
//                                                     that counts is found before it is narrowed: here or in kernels
//   new_tensor(logits, sizes, type), new_gradient(logits)
//   set_groups(op, arguments, sizes)
//   run(op, logits, arguments, kernel)     of at least one row
#pragma once
#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"
#include "layout.h"
#include "softmax_rows.h"

namespace ava {

// The arguments of one call, and what the kernels read.
template <class Device>
struct RowCall : DenseTensors {
  using Arguments = typename Device::Arguments;
  using Kernel = decltype(Device::Kernels::row_loss) Device::Kernels::*;
  const char* op;
  const Tensor& logits;  // [..., n_columns]
  const int64_t vocab_size;
  const ScalarType real;            // of everything but the logits and their gradient
  const std::vector<int64_t> rows;  // the shape of the rows
  Arguments arguments{};

  RowCall(const char* op, const Tensor& logits, int64_t vocab_size)
      : op(op), logits(logits), vocab_size(vocab_size), real(accumulation_type(logits)), rows(checked_rows()) {
    const int64_t n_rows = n_rows_of(logits), n_columns = logits.size(logits.dim() - 1);
    Device::check_size(op, n_rows, n_columns);
    arguments.n_rows = n_rows;
    arguments.n_columns = Columns(n_columns);
    arguments.vocab_size = Columns(vocab_size);
    arguments.logits = logits.const_data_ptr();
    arguments.logits_layout = layout_of(op, "logits", logits);
  }

  void set_options(const Tensor& options,  // [kRowOptions]
                   int64_t flags) {
    check_beside(op, "options", options, {kRowOptions}, real, logits);
    arguments.options = dense(options);
    AVA_CHECK(flags >= 0 && flags < kNextFlag, op, ": expected flags of RowFlags, got ", flags);
    arguments.flags = decltype(arguments.flags)(flags);
  }
  // Behind what says which rows count: the targets, the mask, the statistics.
  // n_own: ids of each row that this library has added itself: the target.
  void set_ids(const char* name, const std::optional<Tensor>& ids, int64_t n_own = 0) {  // [..., n_ids]
    if (!ids) return;
    AVA_CHECK(ids->dim() == logits.dim(), op, ": expected ", name, " of shape ", shape_string(rows), " + [n_ids], got ",
              shape_string(*ids));
    const int64_t n_ids = ids->size(ids->dim() - 1);
    check_beside(op, name, *ids, rows_and(n_ids), index_type(op, name, *ids), logits);
    Device::check_n_ids(op, n_ids - n_own);
    arguments.n_ids = Columns(n_ids);
    dense(*ids);
    Device::set_ids(*this, name, Tensor(kept.back()));
  }
  // Of the logits' type, or of `real`; last stride 1.
  void set_column_weights(const std::optional<Tensor>& weights,  // [..., vocab_size] or [vocab_size], or more columns
                          int64_t flags) {
    AVA_CHECK(
        weights.has_value() == bool(flags & kColumnWeightFlags), op,
        ": expected column_weights with the flags of probabilities or of smoothing weights, and with no other, got ",
        weights ? "column_weights" : "none");
    if (!weights) return;
    const int64_t n_weights = weights->dim() ? weights->size(weights->dim() - 1) : 0;
    const bool is_same_for_all = weights->dim() == 1;
    AVA_CHECK((is_same_for_all || shape_of(*weights) == rows_and(n_weights)) && n_weights >= vocab_size, op,
              ": expected column_weights of shape ", shape_string(rows_and(vocab_size)), " or [", vocab_size,
              "], or with more columns, got ", shape_string(*weights));
    const ScalarType type = weights->scalar_type();
    AVA_CHECK(type == logits.scalar_type() || type == real, op, ": expected column_weights of type ", type_name(real),
              " or of the logits' type ", type_name(logits.scalar_type()), ", got ", type_name(type));
    check_device(op, "column_weights", *weights, logits);
    AVA_CHECK(n_weights == 1 || weights->stride(weights->dim() - 1) == 1, op,
              ": expected column_weights with last stride 1, got ", weights->stride(weights->dim() - 1));
    arguments.column_weights = weights->const_data_ptr();
    arguments.column_weights_layout = layout_of(op, "column_weights", *weights);
    arguments.column_weights_are_real = type == real;
  }
  void set_gradient(const Tensor& grad_logits) {  // [..., n_columns]; may be the logits
    arguments.grad_logits = grad_logits.mutable_data_ptr();
    arguments.grad_layout = layout_of(op, "logits", grad_logits);
  }

  std::vector<int64_t> rows_and(int64_t last) const {  // [..., last]
    std::vector<int64_t> shape = rows;
    shape.push_back(last);
    return shape;
  }
  std::vector<int64_t> and_rows(int64_t first) const {  // [first, ...]
    std::vector<int64_t> shape = rows;
    shape.insert(shape.begin(), first);
    return shape;
  }
  Tensor new_tensor(const std::vector<int64_t>& shape) const { return Device::new_tensor(logits, shape, real); }
  void run(Kernel kernel) const {
    if (arguments.n_rows > 0) Device::run(op, logits, arguments, kernel);
  }

 private:
  using Columns = decltype(Arguments::n_columns);

  std::vector<int64_t> checked_rows() const {
    check_logits(op, logits, vocab_size);
    std::vector<int64_t> shape = shape_of(logits);
    shape.pop_back();
    return shape;
  }
};

template <class Device>
struct RowOperators {
  using Call = RowCall<Device>;
  using Kernels = typename Device::Kernels;

  struct RowLossOutputs {
    Tensor row_loss;          // [...]
    Tensor row_terms;         // [kRowTerms + n_groups, ...], and with kRanks kRankTerms more
    Tensor grad_logits;       // [..., n_columns], or [0]
    Tensor statistics;        // [..., kRowStatistics], or [0]
    Tensor row_coefficients;  // [..., kRowCoefficients + 1 + n_candidates], or [0]
  };
  enum class Gradient { none, fused, split, in_place };

  static RowLossOutputs run_row_loss(const char* op,
                                     const Tensor& logits,                            // [..., n_columns]
                                     const Tensor& targets,                           // [...]
                                     const Tensor& options,                           // [kRowOptions]
                                     const std::optional<Tensor>& row_weights,        // [...]
                                     const std::optional<Tensor>& candidate_ids,      // [..., n_candidates]
                                     const std::optional<Tensor>& candidate_weights,  // [..., n_candidates]
                                     const std::vector<int64_t>& candidate_groups,    // sizes, of n_candidates together
                                     int64_t flags, int64_t vocab_size, int64_t ignore_index, Gradient gradient,
                                     const std::optional<Tensor>& column_weights) {  // [..., vocab_size]
    Call call(op, logits, vocab_size);
    auto& arguments = call.arguments;
    call.set_options(options, flags);
    check_beside(op, "targets", targets, call.rows, ScalarType::Long, logits);
    arguments.targets = static_cast<const int64_t*>(call.dense(targets));
    arguments.ignore_index = ignore_index;
    Device::check_targets(call);
    call.set_column_weights(column_weights, flags);
    if (row_weights) {
      check_beside(op, "row_weights", *row_weights, call.rows, call.real, logits);
      arguments.row_weights = call.dense(*row_weights);
    }
    AVA_CHECK(candidate_ids.has_value() == candidate_weights.has_value(), op,
              ": expected candidate_ids and candidate_weights together, got one of them");
    call.set_ids("candidate_ids", candidate_ids);
    if (candidate_ids) {
      check_beside(op, "candidate_weights", *candidate_weights, call.rows_and(arguments.n_ids), call.real, logits);
      arguments.id_values = call.dense(*candidate_weights);
    }
    int64_t in_groups = 0;
    for (const int64_t size : candidate_groups) {
      AVA_CHECK(size >= 0, op, ": expected candidate_groups of sizes >= 0, got ", size);
      in_groups += size;
    }
    AVA_CHECK(in_groups == arguments.n_ids, op, ": expected candidate_groups to add up to ", arguments.n_ids, ", got ",
              in_groups);
    AVA_CHECK(!(flags & kTargetWeights) || (!candidate_groups.empty() && candidate_groups[0] == 1), op,
              ": expected a first group of 1 candidate, the weight of the target's term");
    Device::set_groups(op, arguments, candidate_groups);

    const bool is_split = gradient == Gradient::split;
    const int64_t n_terms = kRowTerms + arguments.n_groups + (flags & kRanks ? kRankTerms : 0);
    const RowLossOutputs outputs{
        call.new_tensor(call.rows), call.new_tensor(call.and_rows(n_terms)),
        gradient == Gradient::in_place ? logits
        : gradient == Gradient::fused  ? Device::new_gradient(logits)
                                       : Device::new_tensor(logits, {0}, logits.scalar_type()),
        is_split ? call.new_tensor(call.rows_and(kRowStatistics)) : call.new_tensor({0}),
        is_split ? call.new_tensor(call.rows_and(kRowCoefficients + 1 + arguments.n_ids)) : call.new_tensor({0})};
    arguments.row_loss = outputs.row_loss.mutable_data_ptr();
    arguments.row_terms = outputs.row_terms.mutable_data_ptr();
    if (is_split) {
      arguments.statistics = outputs.statistics.mutable_data_ptr();
      arguments.row_coefficients = outputs.row_coefficients.mutable_data_ptr();
    } else if (gradient != Gradient::none) {
      call.set_gradient(outputs.grad_logits);
    }
    call.run(&Kernels::row_loss);
    return outputs;
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> row_loss(
      const Tensor& logits, const Tensor& targets, const Tensor& options, std::optional<Tensor> row_weights,
      std::optional<Tensor> candidate_ids, std::optional<Tensor> candidate_weights,
      std::optional<std::vector<int64_t>> candidate_groups, int64_t flags, int64_t vocab_size, int64_t ignore_index,
      bool with_gradient, bool with_statistics, std::optional<Tensor> column_weights) {
    AVA_CHECK(!(with_gradient && with_statistics), "row_loss: expected with_gradient or with_statistics, got both");
    const Gradient gradient = with_gradient ? Gradient::fused : with_statistics ? Gradient::split : Gradient::none;
    const RowLossOutputs out = run_row_loss("row_loss", logits, targets, options, row_weights, candidate_ids,
                                            candidate_weights, candidate_groups.value_or(std::vector<int64_t>{}), flags,
                                            vocab_size, ignore_index, gradient, column_weights);
    return {out.row_loss, out.row_terms, out.grad_logits, out.statistics, out.row_coefficients};
  }

  static std::tuple<Tensor, Tensor> row_loss_(const Tensor& logits, const Tensor& targets, const Tensor& options,
                                              std::optional<Tensor> row_weights, std::optional<Tensor> candidate_ids,
                                              std::optional<Tensor> candidate_weights,
                                              std::optional<std::vector<int64_t>> candidate_groups, int64_t flags,
                                              int64_t vocab_size, int64_t ignore_index,
                                              std::optional<Tensor> column_weights) {
    const RowLossOutputs out = run_row_loss("row_loss_", logits, targets, options, row_weights, candidate_ids,
                                            candidate_weights, candidate_groups.value_or(std::vector<int64_t>{}), flags,
                                            vocab_size, ignore_index, Gradient::in_place, column_weights);
    return {out.row_loss, out.row_terms};
  }

  static std::tuple<Tensor, Tensor, Tensor> row_statistics(
      const Tensor& logits,            // [..., n_columns]
      std::optional<Tensor> ids,       // [..., n_ids]
      std::optional<Tensor> row_mask,  // [...]: rows to measure; the others give 0
      const Tensor& options,           // [kRowOptions]
      int64_t flags, int64_t vocab_size) {
    Call call("row_statistics", logits, vocab_size);
    auto& arguments = call.arguments;
    call.set_options(options, flags | kEntropy);
    if (row_mask) {
      check_beside(call.op, "row_mask", *row_mask, call.rows, ScalarType::Bool, logits);
      arguments.row_mask = static_cast<const bool*>(call.dense(*row_mask));
    }
    call.set_ids("ids", ids);
    Tensor statistics = call.new_tensor(call.rows_and(kRowStatistics)),
           log_probs = call.new_tensor(call.rows_and(arguments.n_ids)),
           summaries = call.new_tensor(call.and_rows(kRowSummaries));
    arguments.statistics = statistics.mutable_data_ptr();
    arguments.id_log_probs = log_probs.mutable_data_ptr();
    arguments.summaries = summaries.mutable_data_ptr();
    call.run(&Kernels::row_statistics);
    return {statistics, log_probs, summaries};
  }

  static Tensor run_row_gradient(const char* op,
                                 const Tensor& logits,              // [..., n_columns]
                                 const Tensor& statistics,          // [..., kRowStatistics]
                                 const Tensor& row_coefficients,    // [..., kRowCoefficients + n_ids]
                                 const std::optional<Tensor>& ids,  // [..., n_ids]
                                 const Tensor& options,             // [kRowOptions]
                                 int64_t flags, int64_t vocab_size,
                                 const std::optional<Tensor>& column_weights,  // [..., vocab_size]
                                 bool in_place) {
    Call call(op, logits, vocab_size);
    auto& arguments = call.arguments;
    call.set_options(options, flags);
    call.set_column_weights(column_weights, flags);
    check_beside(op, "statistics", statistics, call.rows_and(kRowStatistics), call.real, logits);
    arguments.statistics = const_cast<void*>(call.dense(statistics));
    call.set_ids("ids", ids, 1);
    check_beside(op, "row_coefficients", row_coefficients, call.rows_and(kRowCoefficients + arguments.n_ids), call.real,
                 logits);
    arguments.row_coefficients = const_cast<void*>(call.dense(row_coefficients));
    const Tensor grad_logits = in_place ? logits : Device::new_gradient(logits);  // [..., n_columns]
    call.set_gradient(grad_logits);
    call.run(&Kernels::row_gradient);
    return grad_logits;
  }

  static Tensor row_gradient(const Tensor& logits, const Tensor& statistics, const Tensor& row_coefficients,
                             std::optional<Tensor> ids, const Tensor& options, int64_t flags, int64_t vocab_size,
                             std::optional<Tensor> column_weights) {
    return run_row_gradient("row_gradient", logits, statistics, row_coefficients, ids, options, flags, vocab_size,
                            column_weights, false);
  }

  static void row_gradient_(const Tensor& logits, const Tensor& statistics, const Tensor& row_coefficients,
                            std::optional<Tensor> ids, const Tensor& options, int64_t flags, int64_t vocab_size,
                            std::optional<Tensor> column_weights) {
    run_row_gradient("row_gradient_", logits, statistics, row_coefficients, ids, options, flags, vocab_size,
                     column_weights, true);
  }

  // Touches no row whose factor is 1 (on CUDA the host never knows which those are), and none whose target is ignored.
  static void scale_rows_(const Tensor& rows,             // [..., n_columns], last stride 1
                          const Tensor& factors,          // [...]
                          std::optional<Tensor> targets,  // [...]
                          int64_t ignore_index) {
    Call call("scale_rows_", rows, rows.dim() ? rows.size(rows.dim() - 1) : 1);
    check_beside(call.op, "factors", factors, call.rows, call.real, rows);
    call.arguments.row_weights = call.dense(factors);
    if (targets) {
      check_beside(call.op, "targets", *targets, call.rows, ScalarType::Long, rows);
      call.arguments.targets = static_cast<const int64_t*>(call.dense(*targets));
      call.arguments.ignore_index = ignore_index;
    }
    call.set_gradient(rows);
    call.run(&Kernels::scale_rows);
  }

  template <class Library>
  static void register_all(Library& m) {
    m.impl("row_loss", AVA_BOX(&RowOperators::row_loss));
    m.impl("row_loss_", AVA_BOX(&RowOperators::row_loss_));
    m.impl("row_statistics", AVA_BOX(&RowOperators::row_statistics));
    m.impl("row_gradient", AVA_BOX(&RowOperators::row_gradient));
    m.impl("row_gradient_", AVA_BOX(&RowOperators::row_gradient_));
    m.impl("scale_rows_", AVA_BOX(&RowOperators::scale_rows_));
  }
};

}  // namespace ava
