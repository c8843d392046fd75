// Launches of the kernels over a router's rows in registers.
#pragma once
#include <algorithm>

#include "router_rows_gradient.cuh"
#include "router_rows_statistics.cuh"

namespace ava {

template <class Element, int kItems, bool kSigmoid>
void run_router_lanes_of(bool is_gradient, const RouterArguments<float>& arguments, int64_t n_layers, Stream stream) {
  const int n_lanes = lanes_of_row(arguments.n_experts);
  LaunchShape shape{};
  shape.grid = dim3(unsigned(arguments.n_slots), unsigned(n_layers));
  shape.block = dim3(kRouterThreads);
  shape.shared_bytes = router_row_bytes(arguments.n_experts, int(sizeof(Element)));
  if (is_gradient)
    return launch("router_gradient", router_gradient_kernel<Element, kItems, kSigmoid>, shape, stream, arguments,
                  n_lanes);
  shape.shared_bytes =
      std::max(shape.shared_bytes, kRouterWarps * (3 * size_t(arguments.n_experts) + 3) * sizeof(float));
  launch("router_statistics", router_statistics_kernel<Element, kItems, kSigmoid>, shape, stream, arguments, n_lanes);
}

template <class Element, bool kSigmoid>
void run_router_lanes(bool is_gradient, const RouterArguments<float>& arguments, int64_t n_layers, Stream stream) {
  if (items_of_lane(arguments.n_experts) == 8)
    run_router_lanes_of<Element, 8, kSigmoid>(is_gradient, arguments, n_layers, stream);
  else
    run_router_lanes_of<Element, 16, kSigmoid>(is_gradient, arguments, n_layers, stream);
}

}  // namespace ava
