// Argument checks of router_statistics and router_gradient, and where their rows are.
#pragma once
#include <optional>
#include <vector>

#include "checks.h"
#include "row_layout.h"

namespace ava {

// What the layers of a router have in common.
struct RouterShape {
  int64_t n_layers = 0, n_rows = 1, n_experts = 0;
  std::vector<int64_t> gradient;  // [n_layers, ..., n_experts]
  ScalarType real;                // of statistics and their gradients
};

// gate_logits: tensors [n_layers, ..., n_experts], each of some layers, that differ in their number of layers at most
inline RouterShape check_gate_logits(const char* op, const std::vector<Tensor>& gate_logits) {
  STD_TORCH_CHECK(!gate_logits.empty(), op, ": expected at least one tensor of gate_logits, got none");
  const Tensor& first = gate_logits[0];
  RouterShape shape;
  for (const Tensor& layers : gate_logits) {
    STD_TORCH_CHECK(layers.dim() >= 3, op, ": expected gate_logits of shape [n_layers, n_rows, n_experts], got ",
                    shape_string(layers));
    STD_TORCH_CHECK(layers.scalar_type() == first.scalar_type(), op, ": expected gate_logits of one type, got ",
                    type_name(first.scalar_type()), " and ", type_name(layers.scalar_type()));
    std::vector<int64_t> sizes = shape_of(layers), wanted = shape_of(first);
    shape.n_layers += sizes[0];
    sizes[0] = wanted[0] = 0;
    STD_TORCH_CHECK(sizes == wanted, op, ": expected layers of one shape, got ", shape_string(first), " and ",
                    shape_string(layers));
    STD_TORCH_CHECK(layers.device() == first.device(), op, ": expected gate_logits on one device");
    const int64_t last = layers.dim() - 1;
    STD_TORCH_CHECK(layers.size(last) == 1 || layers.stride(last) == 1, op,
                    ": expected gate_logits with last stride 1, got ", layers.stride(last));
  }
  element_type(op, first);
  shape.real = accumulation_type(first);
  shape.gradient = shape_of(first);
  shape.gradient[0] = shape.n_layers;
  shape.n_experts = shape.gradient.back();
  for (size_t dim = 1; dim + 1 < shape.gradient.size(); ++dim) shape.n_rows *= shape.gradient[dim];
  STD_TORCH_CHECK(shape.n_experts >= 1 && shape.n_experts < (int64_t(1) << 24), op,
                  ": expected a number of experts in [1, 2^24), got ", shape.n_experts);
  return shape;
}

// of the rows of one layer, [..., n_experts] behind the first dimension
inline RowLayout layout_of_layer(const Tensor& layers) {
  RowLayout layout{};
  for (int64_t dim = 1; dim + 1 < layers.dim(); ++dim) {
    const int64_t size = layers.size(dim), stride = layers.stride(dim);
    if (size == 1) continue;
    int& n = layout.n_dims;
    if (n > 0 && layout.strides[n - 1] == size * stride) {
      layout.sizes[n - 1] *= size, layout.strides[n - 1] = stride;
      continue;
    }
    STD_TORCH_CHECK(n < kMostLeadingDims, "expected gate_logits with at most ", kMostLeadingDims, " leading strides");
    layout.sizes[n] = size, layout.strides[n] = stride;
    ++n;
  }
  return layout;
}

inline void check_router_rows(const char* op, const RouterShape& shape, const std::optional<Tensor>& expert_indices,
                              const std::optional<Tensor>& row_mask, const std::optional<Tensor>& segment_ids,
                              int64_t n_segments) {
  if (expert_indices) {
    const Tensor& indices = *expert_indices;
    STD_TORCH_CHECK(indices.dim() == 3 && indices.size(0) == shape.n_layers && indices.size(1) == shape.n_rows, op,
                    ": expected expert_indices of shape ", shape_string({shape.n_layers, shape.n_rows}), " + [k], got ",
                    shape_string(indices));
    STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Long || indices.scalar_type() == ScalarType::Int, op,
                    ": expected expert_indices of type int64 or int32, got ", type_name(indices.scalar_type()));
  }
  if (row_mask) {
    const std::vector<int64_t> of_all = {shape.n_rows}, per_layer = {shape.n_layers, shape.n_rows};
    check_tensor(op, "row_mask", *row_mask, row_mask->dim() == 1 ? of_all : per_layer, ScalarType::Bool);
  }
  STD_TORCH_CHECK(n_segments >= 1, op, ": expected n_segments >= 1, got ", n_segments);
  if (segment_ids)
    check_tensor(op, "segment_ids", *segment_ids, {shape.n_rows}, ScalarType::Long);
  else
    STD_TORCH_CHECK(n_segments == 1, op, ": expected segment_ids beside n_segments = ", n_segments, ", got none");
}

inline RouterShape check_router_statistics(const std::vector<Tensor>& gate_logits,  // of [n_layers, ..., n_experts]
                                           const std::optional<Tensor>& expert_indices,  // [n_layers, n_rows, k]
                                           const std::optional<Tensor>& row_mask,     // [n_rows] or [n_layers, n_rows]
                                           const std::optional<Tensor>& segment_ids,  // [n_rows]
                                           const std::optional<Tensor>& expert_bias,  // [n_layers, n_experts]
                                           int64_t n_segments, int64_t k) {
  const char* op = "router_statistics";
  const RouterShape shape = check_gate_logits(op, gate_logits);
  check_router_rows(op, shape, expert_indices, row_mask, segment_ids, n_segments);
  STD_TORCH_CHECK(k >= 1 && k <= shape.n_experts, op, ": expected k in [1, n_experts = ", shape.n_experts, "], got ",
                  k);
  STD_TORCH_CHECK(!expert_indices || expert_indices->size(2) == k, op, ": expected expert_indices of shape ",
                  shape_string({shape.n_layers, shape.n_rows, k}), ", got ", shape_string(*expert_indices));
  if (expert_bias) check_tensor(op, "expert_bias", *expert_bias, {shape.n_layers, shape.n_experts}, shape.real);
  return shape;
}

inline RouterShape check_router_gradient(
    const std::vector<Tensor>& gate_logits,         // of [n_layers, ..., n_experts]
    const std::optional<Tensor>& expert_indices,    // [n_layers, n_rows, k]
    const std::optional<Tensor>& row_mask,          // [n_rows] or [n_layers, n_rows]
    const std::optional<Tensor>& segment_ids,       // [n_rows]
    const std::optional<Tensor>& grad_probability,  // [n_layers * n_segments, n_experts]
    const std::optional<Tensor>& grad_importance,   // [n_layers * n_segments, n_experts]
    const std::optional<Tensor>& grad_lse_squared,  // [n_layers * n_segments]
    const std::optional<Tensor>& grad_entropy,      // [n_layers * n_segments]
    int64_t n_segments) {
  const char* op = "router_gradient";
  const RouterShape shape = check_gate_logits(op, gate_logits);
  check_router_rows(op, shape, expert_indices, row_mask, segment_ids, n_segments);
  const int64_t n_groups = shape.n_layers * n_segments;
  if (grad_probability)
    check_tensor(op, "grad_probability_sum", *grad_probability, {n_groups, shape.n_experts}, shape.real);
  if (grad_importance) {
    check_tensor(op, "grad_importance_sum", *grad_importance, {n_groups, shape.n_experts}, shape.real);
    STD_TORCH_CHECK(expert_indices.has_value(), op, ": expected expert_indices beside grad_importance_sum, got none");
  }
  if (grad_lse_squared) check_tensor(op, "grad_lse_squared_sum", *grad_lse_squared, {n_groups}, shape.real);
  if (grad_entropy) check_tensor(op, "grad_entropy_sum", *grad_entropy, {n_groups}, shape.real);
  return shape;
}

}  // namespace ava
