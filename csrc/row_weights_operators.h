// count_rows, written once for every device.
#pragma once
#include <optional>
#include <tuple>

#include "checks.h"
#include "row_weights.h"

namespace ava {

// targets [n_rows] are one sequence
template <class Value>
TokenGrid<Value> token_grid(const std::optional<Tensor>& values) {  // [batch_size, n_tokens] or [n_rows]
  if (!values) return {};
  const int64_t last = values->dim() - 1;
  return {static_cast<const Value*>(values->const_data_ptr()), last > 0 ? values->stride(0) : 0, values->stride(last)};
}

// Device::new_tensor(like, sizes, type), Device::run(targets, rows)
template <class Device, class Real>
std::tuple<Tensor, Tensor, Tensor> rows_of_type(const Tensor& targets, const std::optional<Tensor>& keep,
                                                const std::optional<Tensor>& token_weights,
                                                const std::optional<Tensor>& class_weights,
                                                const std::optional<Tensor>& n_items, int64_t ignore_index,
                                                bool is_mean, ScalarType real) {
  const std::vector<int64_t> shape = shape_of(targets);
  const Tensor counted_targets = Device::new_tensor(targets, shape, ScalarType::Long),
               n_counted = Device::new_tensor(targets, {}, real), weights = Device::new_tensor(targets, shape, real);
  RowWeights<Real> rows{};
  rows.targets = token_grid<int64_t>(targets);
  rows.keep = token_grid<bool>(keep);
  rows.token_weights = token_grid<Real>(token_weights);
  const auto numbers = [](const std::optional<Tensor>& tensor) {
    return tensor ? static_cast<const Real*>(tensor->const_data_ptr()) : nullptr;
  };
  rows.class_weights = numbers(class_weights);
  rows.n_items = numbers(n_items);
  rows.batch_size = shape.size() > 1 ? shape[0] : 1;
  rows.n_tokens = shape.back();
  rows.n_classes = class_weights ? class_weights->size(0) : 0;
  rows.ignore_index = ignore_index;
  rows.is_mean = is_mean;
  rows.counted_targets = static_cast<int64_t*>(counted_targets.mutable_data_ptr());
  rows.weights = static_cast<Real*>(weights.mutable_data_ptr());
  rows.n_counted = static_cast<Real*>(n_counted.mutable_data_ptr());
  Device::run(targets, rows);
  return {counted_targets, n_counted, weights};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> count_rows(const Tensor& targets,             // [batch_size, n_tokens] or [n_rows]
                                              const std::optional<Tensor> keep,  // as targets, bool
                                              const std::optional<Tensor> token_weights,  // as targets
                                              const std::optional<Tensor> class_weights,  // [n_classes]
                                              const std::optional<Tensor> n_items,        // []
                                              int64_t ignore_index, bool is_mean, bool is_double) {
  const char* op = "count_rows";
  const ScalarType real = is_double ? ScalarType::Double : ScalarType::Float;
  AVA_CHECK(targets.dim() == 1 || targets.dim() == 2, op,
            ": expected targets of shape [batch_size, n_tokens] or [n_rows], got ", shape_string(targets));
  AVA_CHECK(targets.scalar_type() == ScalarType::Long, op, ": expected targets of type int64, got ",
            type_name(targets.scalar_type()));
  const std::vector<int64_t> shape = shape_of(targets);
  const auto check = [&](const char* name, const std::optional<Tensor>& tensor, const std::vector<int64_t>& expected,
                         ScalarType type) {
    if (tensor) check_beside(op, name, *tensor, expected, type, targets);
  };
  check("keep", keep, shape, ScalarType::Bool);
  check("token_weights", token_weights, shape, real);
  check("n_items", n_items, {}, real);
  if (class_weights) {
    AVA_CHECK(class_weights->dim() == 1 && class_weights->size(0) > 0 && class_weights->stride(0) == 1, op,
              ": expected dense class_weights of shape [n_classes], got ", shape_string(*class_weights));
    check("class_weights", class_weights, shape_of(*class_weights), real);
  }
  const auto rows_of = is_double ? rows_of_type<Device, double> : rows_of_type<Device, float>;
  return rows_of(targets, keep, token_weights, class_weights, n_items, ignore_index, is_mean, real);
}

}  // namespace ava
