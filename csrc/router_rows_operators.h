// What router_statistics and router_gradient of every device share: checks, and the arguments they make of them.
#pragma once
#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"
#include "layout.h"
#include "router_rows.h"

namespace ava {

// What the layers of a router have in common.
struct RouterShape {
  int64_t n_layers = 0, n_rows = 1, n_experts = 0;
  std::vector<int64_t> gradient;  // [n_layers, ..., n_experts]
  ScalarType real;                // of statistics and their gradients
};

// gate_logits: tensors [n_layers, ..., n_experts], each of some layers, that differ in their number of layers at most
inline RouterShape check_gate_logits(const char* op, const std::vector<Tensor>& gate_logits) {
  AVA_CHECK(!gate_logits.empty(), op, ": expected at least one tensor of gate_logits, got none");
  const Tensor& first = gate_logits[0];
  RouterShape shape;
  for (const Tensor& layers : gate_logits) {
    AVA_CHECK(layers.dim() >= 3, op, ": expected gate_logits of shape [n_layers, n_rows, n_experts], got ",
              shape_string(layers));
    AVA_CHECK(layers.scalar_type() == first.scalar_type(), op, ": expected gate_logits of one type, got ",
              type_name(first.scalar_type()), " and ", type_name(layers.scalar_type()));
    std::vector<int64_t> sizes = shape_of(layers), wanted = shape_of(first);
    shape.n_layers += sizes[0];
    sizes[0] = wanted[0] = 0;
    AVA_CHECK(sizes == wanted, op, ": expected layers of one shape, got ", shape_string(first), " and ",
              shape_string(layers));
    check_device(op, "gate_logits", layers, first);
    const int64_t last = layers.dim() - 1;
    AVA_CHECK(layers.size(last) == 1 || layers.stride(last) == 1, op, ": expected gate_logits with last stride 1, got ",
              layers.stride(last));
  }
  element_type(op, first);
  shape.real = accumulation_type(first);
  shape.gradient = shape_of(first);
  shape.gradient[0] = shape.n_layers;
  shape.n_experts = shape.gradient.back();
  for (size_t dim = 1; dim + 1 < shape.gradient.size(); ++dim) shape.n_rows *= shape.gradient[dim];
  AVA_CHECK(shape.n_experts >= 1 && shape.n_experts < (int64_t(1) << 24), op,
            ": expected a number of experts in [1, 2^24), got ", shape.n_experts);
  return shape;
}

inline void check_router_rows(const char* op, const RouterShape& shape, const std::optional<Tensor>& expert_indices,
                              const std::optional<Tensor>& row_mask, const std::optional<Tensor>& segment_ids,
                              int64_t n_segments, const Tensor& gate_logits) {
  if (expert_indices) {
    const Tensor& indices = *expert_indices;
    AVA_CHECK(indices.dim() == 3 && indices.size(0) == shape.n_layers && indices.size(1) == shape.n_rows, op,
              ": expected expert_indices of shape ", shape_string({shape.n_layers, shape.n_rows}), " + [k], got ",
              shape_string(indices));
    index_type(op, "expert_indices", indices);
    check_device(op, "expert_indices", indices, gate_logits);
  }
  if (row_mask) {
    const std::vector<int64_t> of_all = {shape.n_rows}, per_layer = {shape.n_layers, shape.n_rows};
    check_beside(op, "row_mask", *row_mask, row_mask->dim() == 1 ? of_all : per_layer, ScalarType::Bool, gate_logits);
  }
  AVA_CHECK(n_segments >= 1, op, ": expected n_segments >= 1, got ", n_segments);
  if (segment_ids)
    check_beside(op, "segment_ids", *segment_ids, {shape.n_rows}, ScalarType::Long, gate_logits);
  else
    AVA_CHECK(n_segments == 1, op, ": expected segment_ids beside n_segments = ", n_segments, ", got none");
}

inline RouterShape check_router_statistics(const std::vector<Tensor>& gate_logits,  // of [n_layers, ..., n_experts]
                                           const std::optional<Tensor>& expert_indices,  // [n_layers, n_rows, k]
                                           const std::optional<Tensor>& row_mask,     // [n_rows] or [n_layers, n_rows]
                                           const std::optional<Tensor>& segment_ids,  // [n_rows]
                                           const std::optional<Tensor>& expert_bias,  // [n_layers, n_experts]
                                           int64_t n_segments, int64_t k) {
  const char* op = "router_statistics";
  const RouterShape shape = check_gate_logits(op, gate_logits);
  check_router_rows(op, shape, expert_indices, row_mask, segment_ids, n_segments, gate_logits[0]);
  AVA_CHECK(k >= 1 && k <= shape.n_experts, op, ": expected k in [1, n_experts = ", shape.n_experts, "], got ", k);
  AVA_CHECK(!expert_indices || expert_indices->size(2) == k, op, ": expected expert_indices of shape ",
            shape_string({shape.n_layers, shape.n_rows, k}), ", got ", shape_string(*expert_indices));
  if (expert_bias)
    check_beside(op, "expert_bias", *expert_bias, {shape.n_layers, shape.n_experts}, shape.real, gate_logits[0]);
  return shape;
}

// [n_layers, n_rows, bytes]: own choices, as router_rows.h keeps them
inline std::vector<int64_t> choice_sizes(const RouterShape& shape) {
  return {shape.n_layers, shape.n_rows, bytes_of_choice(shape.n_experts)};
}

inline RouterShape check_router_gradient(
    const std::vector<Tensor>& gate_logits,         // of [n_layers, ..., n_experts]
    const std::optional<Tensor>& expert_indices,    // [n_layers, n_rows, k]
    const std::optional<Tensor>& expert_choice,     // choice_sizes
    const std::optional<Tensor>& row_mask,          // [n_rows] or [n_layers, n_rows]
    const std::optional<Tensor>& segment_ids,       // [n_rows]
    const std::optional<Tensor>& grad_probability,  // [n_layers * n_segments, n_experts]
    const std::optional<Tensor>& grad_importance,   // [n_layers * n_segments, n_experts]
    const std::optional<Tensor>& grad_lse_squared,  // [n_layers * n_segments]
    const std::optional<Tensor>& grad_entropy,      // [n_layers * n_segments]
    int64_t n_segments) {
  const char* op = "router_gradient";
  const RouterShape shape = check_gate_logits(op, gate_logits);
  check_router_rows(op, shape, expert_indices, row_mask, segment_ids, n_segments, gate_logits[0]);
  const int64_t n_groups = shape.n_layers * n_segments;
  if (grad_probability)
    check_beside(op, "grad_probability_sum", *grad_probability, {n_groups, shape.n_experts}, shape.real,
                 gate_logits[0]);
  if (grad_importance)
    check_beside(op, "grad_importance_sum", *grad_importance, {n_groups, shape.n_experts}, shape.real, gate_logits[0]);
  if (expert_choice)
    check_beside(op, "expert_choice", *expert_choice, choice_sizes(shape), ScalarType::Byte, gate_logits[0]);
  if (grad_lse_squared)
    check_beside(op, "grad_lse_squared_sum", *grad_lse_squared, {n_groups}, shape.real, gate_logits[0]);
  if (grad_entropy) check_beside(op, "grad_entropy_sum", *grad_entropy, {n_groups}, shape.real, gate_logits[0]);
  AVA_CHECK(!grad_importance || expert_indices.has_value() != expert_choice.has_value(), op,
            ": expected either expert_indices or expert_choice beside grad_importance_sum, got ",
            expert_choice ? "both" : "neither");
  return shape;
}

// Sets what the arguments of both devices call by the same names.
template <class Arguments>
void set_choices_and_mask(Arguments& arguments, const RouterShape& shape,
                          const std::optional<Tensor>& expert_indices,  // [n_layers, n_rows, k]
                          const std::optional<Tensor>& row_mask,        // [n_rows] or [n_layers, n_rows]
                          DenseTensors& tensors) {
  if (expert_indices) {
    arguments.k = expert_indices->size(2);
    const void* const indices = tensors.dense(*expert_indices);
    if (expert_indices->scalar_type() == ScalarType::Long)
      arguments.wide_indices = static_cast<const int64_t*>(indices);
    else
      arguments.indices = static_cast<const int32_t*>(indices);
  }
  if (row_mask) {
    arguments.row_mask = static_cast<const bool*>(tensors.dense(*row_mask));
    arguments.mask_stride = row_mask->dim() == 2 ? shape.n_rows : 0;
  }
}

// probability_sum, importance_sum, lse_squared_sum, entropy_sum, counts, n_rows, expert_choice
using RouterOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

}  // namespace ava
