// The router family on CUDA: checks, outputs and launches, as csrc/cpu/router_rows.cpp has them. Ids out of range are a
// device assert of the kernels, as in torch: nothing here waits for the device.
#include "router_rows.cuh"

#include "../new_tensor.h"
#include "../router_rows_operators.h"
#include "launch.h"

namespace ava {
namespace {

// What both operators are given. Keeps what the kernels read alive until the launch.
template <class Real>
struct RouterCall : DenseTensors {
  const char* op;
  const RouterShape& shape;
  const std::vector<Tensor>& gate_logits;  // of [n_layers, ..., n_experts]
  const DeviceScope& device;
  int64_t n_segments;
  RouterArguments<Real> arguments{};

  RouterCall(const char* op, const RouterShape& shape, const std::vector<Tensor>& gate_logits,
             const std::optional<Tensor>& expert_indices,  // [n_layers, n_rows, k]
             const std::optional<Tensor>& row_mask,        // [n_rows] or [n_layers, n_rows]
             const std::optional<Tensor>& segment_ids,     // [n_rows]
             int64_t n_segments, const DeviceScope& device)
      : op(op), shape(shape), gate_logits(gate_logits), device(device), n_segments(n_segments) {
    constexpr int64_t kMost = int64_t(1) << 31;
    AVA_CHECK(n_segments < kMost - 1, op, ": expected n_segments below 2^31 - 1, got ", n_segments);
    AVA_CHECK(shape.n_rows < kMost, op, ": expected fewer than 2^31 rows, got ", shape.n_rows);
    arguments.n_rows = shape.n_rows;
    arguments.n_experts = shape.n_experts;
    arguments.n_segments = n_segments;
    arguments.rows_in_slot = rows_in_slot(shape.n_experts);
    arguments.n_slots = most_slots(shape.n_rows, shape.n_experts, n_segments, segment_ids.has_value());
    set_choices_and_mask(arguments, shape, expert_indices, row_mask, *this);
    if (segment_ids) sort_by_segment(static_cast<const int64_t*>(dense(segment_ids)));
  }

  Tensor new_tensor(const std::vector<int64_t>& sizes, ScalarType type) const {
    return ava::new_tensor(gate_logits[0], sizes, type);
  }
  // memory for the kernels alone
  template <class Value>
  Value* workspace(int64_t n_values) {
    const int64_t n_bytes = n_values * int64_t(sizeof(Value));
    kept.push_back(new_tensor({n_bytes}, ScalarType::Byte));
    return static_cast<Value*>(kept.back().mutable_data_ptr());
  }

  void sort_by_segment(const int64_t* segment_ids) {
    const Tensor keys = new_tensor({shape.n_rows}, ScalarType::Int);
    write_segment_keys(segment_ids, shape.n_rows, n_segments, static_cast<int32_t*>(keys.mutable_data_ptr()),
                       device.stream());
    const auto [sorted_keys, order] = sort_keys(keys);
    kept.push_back(order);
    arguments.order = static_cast<const int64_t*>(order.const_data_ptr());
    int64_t* const starts = workspace<int64_t>(n_segments + 2);
    write_segment_starts(static_cast<const int32_t*>(sorted_keys.const_data_ptr()), shape.n_rows, n_segments, starts,
                         device.stream());
    arguments.segment_starts = starts;
  }

  // As few launches as there are kinds of layout, of kLayersPerLaunch layers at most.
  void run(bool is_gradient, bool is_sigmoid) {
    int64_t n_layers = 0;
    const auto run_layers = [&] {
      if (n_layers > 0) run_layers_of(is_gradient, is_sigmoid, n_layers);
      arguments.first_layer += n_layers;
      n_layers = 0;
    };
    for (const Tensor& layers : gate_logits) {
      const RowLayout layout = layout_of(op, "gate_logits", layers, 1);
      if (!same_layout(layout, arguments.layout)) run_layers();
      arguments.layout = layout;
      const auto* const first = static_cast<const char*>(layers.const_data_ptr());
      for (int64_t of_tensor = 0; of_tensor < layers.size(0); ++of_tensor) {
        arguments.logits[n_layers++] = first + of_tensor * layers.stride(0) * int64_t(layers.element_size());
        if (n_layers == kLayersPerLaunch) run_layers();
      }
    }
    run_layers();
  }

 private:
  static bool same_layout(const RowLayout& one, const RowLayout& other) {
    return one.n_dims == other.n_dims && std::equal(one.sizes, one.sizes + one.n_dims, other.sizes) &&
           std::equal(one.strides, one.strides + one.n_dims, other.strides);
  }
  template <class Element>
  void run_elements(bool is_gradient, bool is_sigmoid, int64_t n_layers) const {
    if (is_sigmoid)
      run_router<Element, true>(is_gradient, arguments, n_layers, device.stream());
    else
      run_router<Element, false>(is_gradient, arguments, n_layers, device.stream());
  }
  void run_layers_of(bool is_gradient, bool is_sigmoid, int64_t n_layers) const {
    if constexpr (std::is_same<Real, double>::value) {
      run_elements<double>(is_gradient, is_sigmoid, n_layers);
    } else {
      switch (element_type(op, gate_logits[0])) {
        case ElementType::bf16: return run_elements<__nv_bfloat16>(is_gradient, is_sigmoid, n_layers);
        case ElementType::f16: return run_elements<__half>(is_gradient, is_sigmoid, n_layers);
        default: return run_elements<float>(is_gradient, is_sigmoid, n_layers);
      }
    }
  }
};

template <class Real>
RouterOutputs statistics_of(RouterCall<Real> call, const std::optional<Tensor>& expert_bias, int64_t k,
                            bool is_sigmoid) {
  const RouterShape& shape = call.shape;
  RouterArguments<Real>& arguments = call.arguments;
  const int64_t n_groups = shape.n_layers * call.n_segments, n_experts = shape.n_experts;
  const bool is_given = arguments.is_given();
  const std::vector<int64_t> vectors = {n_groups, n_experts}, scalars = {n_groups};
  Tensor choice = call.new_tensor(is_given ? std::vector<int64_t>{0} : choice_sizes(shape), ScalarType::Byte);
  Tensor probability = call.new_tensor(vectors, shape.real), importance = call.new_tensor(vectors, shape.real),
         lse_squared = call.new_tensor(scalars, shape.real), entropy = call.new_tensor(scalars, shape.real),
         counts = call.new_tensor(vectors, ScalarType::Long), n_rows = call.new_tensor(scalars, ScalarType::Long);
  if (!is_given) {
    arguments.k = k;
    arguments.new_choice = static_cast<uint8_t*>(choice.mutable_data_ptr());
    arguments.expert_bias = static_cast<const Real*>(call.dense(expert_bias));
  }
  const int64_t n_slots = shape.n_layers * arguments.n_slots;
  arguments.sums = call.template workspace<Real>(n_slots * (2 * n_experts + 2));
  arguments.counts = call.template workspace<int32_t>(n_slots * (n_experts + 1));
  if (is_wide_router<Real>(n_experts, is_given, arguments.k))
    arguments.wide_rows = call.template workspace<WideRouterRow<Real>>(shape.n_layers * shape.n_rows);
  call.run(false, is_sigmoid);
  const auto pointer = [](Tensor& tensor) { return static_cast<Real*>(tensor.mutable_data_ptr()); };
  add_group_sums<Real>(
      arguments, n_groups,
      {pointer(probability), pointer(importance), pointer(lse_squared), pointer(entropy),
       static_cast<int64_t*>(counts.mutable_data_ptr()), static_cast<int64_t*>(n_rows.mutable_data_ptr())},
      call.device.stream());
  return {probability, importance, lse_squared, entropy, counts, n_rows, choice};
}

RouterOutputs router_statistics_cuda(std::vector<Tensor> gate_logits,       // of [n_layers, ..., n_experts]
                                     std::optional<Tensor> expert_indices,  // [n_layers, n_rows, k]
                                     std::optional<Tensor> row_mask,        // [n_rows] or [n_layers, n_rows]
                                     std::optional<Tensor> segment_ids,     // [n_rows]
                                     std::optional<Tensor> expert_bias,     // [n_layers, n_experts]
                                     int64_t n_segments, int64_t k, bool is_sigmoid) {
  const RouterShape shape =
      check_router_statistics(gate_logits, expert_indices, row_mask, segment_ids, expert_bias, n_segments, k);
  const DeviceScope device(gate_logits[0]);
  const auto run = [&](auto real) {
    return statistics_of(RouterCall<decltype(real)>("router_statistics", shape, gate_logits, expert_indices, row_mask,
                                                    segment_ids, n_segments, device),
                         expert_bias, k, is_sigmoid);
  };
  return shape.real == ScalarType::Double ? run(double()) : run(float());
}

Tensor router_gradient_cuda(std::vector<Tensor> gate_logits,         // of [n_layers, ..., n_experts]
                            std::optional<Tensor> expert_indices,    // [n_layers, n_rows, k]
                            std::optional<Tensor> expert_choice,     // [n_layers, n_rows, bytes]: own ones
                            std::optional<Tensor> row_mask,          // [n_rows] or [n_layers, n_rows]
                            std::optional<Tensor> segment_ids,       // [n_rows]
                            std::optional<Tensor> grad_probability,  // [n_groups, n_experts]
                            std::optional<Tensor> grad_importance,   // [n_groups, n_experts]
                            std::optional<Tensor> grad_lse_squared,  // [n_groups]
                            std::optional<Tensor> grad_entropy,      // [n_groups]
                            int64_t n_segments, bool is_sigmoid) {
  const char* op = "router_gradient";
  const RouterShape shape =
      check_router_gradient(gate_logits, expert_indices, expert_choice, row_mask, segment_ids, grad_probability,
                            grad_importance, grad_lse_squared, grad_entropy, n_segments);
  const DeviceScope device(gate_logits[0]);
  Tensor grad_logits = new_tensor(gate_logits[0], shape.gradient, gate_logits[0].scalar_type());
  const auto run = [&](auto real) {
    using Real = decltype(real);
    RouterCall<Real> call(op, shape, gate_logits, expert_indices, row_mask, segment_ids, n_segments, device);
    RouterArguments<Real>& arguments = call.arguments;
    arguments.choice = static_cast<const uint8_t*>(call.dense(expert_choice));
    arguments.grad_probability = static_cast<const Real*>(call.dense(grad_probability));
    arguments.grad_importance = static_cast<const Real*>(call.dense(grad_importance));
    arguments.grad_lse_squared = static_cast<const Real*>(call.dense(grad_lse_squared));
    arguments.grad_entropy = static_cast<const Real*>(call.dense(grad_entropy));
    arguments.grad_logits = grad_logits.mutable_data_ptr();
    call.run(true, is_sigmoid);
  };
  shape.real == ScalarType::Double ? run(double()) : run(float());
  return grad_logits;
}

}  // namespace
}  // namespace ava

AVA_CUDA_OPERATORS(m) {
  m.impl("router_statistics", AVA_BOX(&ava::router_statistics_cuda));
  m.impl("router_gradient", AVA_BOX(&ava::router_gradient_cuda));
}
