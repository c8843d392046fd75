// Starts the kernels for one type of logits. Included once by each softmax_rows_<type>.cu.
#pragma once
#include "softmax_rows_elementwise.cuh"
#include "softmax_rows_kernels.h"
#include "softmax_rows_plan.h"

namespace ava {

template <class Element, Features kFeatures>
void launch_row_loss_with(const char* op, RowArguments arguments, const DeviceLimits& device, Stream stream) {
  const RowPlan plan = plan_rows(arguments.n_columns, int(sizeof(Element)), arguments.n_ids, device);
  arguments.cluster_size = plan.cluster_size;
  arguments.capacity = plan.capacity;
  arguments.n_slots = (plan.capacity + plan.n_threads - 1) / plan.n_threads;
  LaunchShape shape{};
  shape.grid = dim3(unsigned(plan.n_blocks(arguments.n_rows, device)));
  arguments.row_step = shape.grid.x / unsigned(plan.cluster_size);
  shape.block = dim3(unsigned(plan.n_threads));
  shape.shared_bytes = plan.shared_bytes;
  shape.cluster_size = unsigned(plan.cluster_size);
  switch (plan.residence) {
    case Residence::registers:
      return launch(op, row_loss_kernel<Element, Residence::registers, kFeatures>, shape, stream, arguments);
    case Residence::shared:
      return launch(op, row_loss_kernel<Element, Residence::shared, kFeatures>, shape, stream, arguments);
    case Residence::clusters:
      return launch(op, row_loss_kernel<Element, Residence::clusters, kFeatures>, shape, stream, arguments);
    case Residence::streamed:
      return launch(op, row_loss_kernel<Element, Residence::streamed, kFeatures>, shape, stream, arguments);
  }
}

// Parts of kPartCapacity vectors, a block for each
template <class Element>
LaunchShape elementwise_shape(RowArguments& arguments) {
  constexpr int kSize = kVectorSize<Element>;
  const int row_vectors = (arguments.n_columns + kSize - 1) / kSize + 1;
  arguments.cluster_size = (row_vectors + kPartCapacity - 1) / kPartCapacity;
  LaunchShape shape{};
  shape.grid = dim3(unsigned(arguments.n_rows), unsigned(arguments.cluster_size));
  shape.block = dim3(kPartThreads);
  return shape;
}

template <class Element, Features kFeatures>
void launch_row_gradient_with(const char* op, RowArguments arguments, const DeviceLimits&, Stream stream) {
  LaunchShape shape = elementwise_shape<Element>(arguments);
  shape.shared_bytes = sizeof(RowScratch<float>) + size_t(arguments.n_ids + 1) * sizeof(SparseEntry<float>);
  launch(op, row_gradient_kernel<Element, kFeatures>, shape, stream, arguments);
}

inline Features features_of(int32_t flags) {
  if (flags & kSoftcap) return Features::capped;
  return flags & (kLabelSmoothing | kConfidencePenalty | kEntropy) ? Features::dense : Features::plain;
}

template <class Element>
void launch_row_loss(const char* op, RowArguments arguments, const DeviceLimits& device, Stream stream) {
  switch (features_of(arguments.flags)) {
    case Features::plain: return launch_row_loss_with<Element, Features::plain>(op, arguments, device, stream);
    case Features::dense: return launch_row_loss_with<Element, Features::dense>(op, arguments, device, stream);
    case Features::capped: return launch_row_loss_with<Element, Features::capped>(op, arguments, device, stream);
  }
}

template <class Element>
void launch_row_gradient(const char* op, RowArguments arguments, const DeviceLimits& device, Stream stream) {
  switch (features_of(arguments.flags)) {
    case Features::plain: return launch_row_gradient_with<Element, Features::plain>(op, arguments, device, stream);
    case Features::dense: return launch_row_gradient_with<Element, Features::dense>(op, arguments, device, stream);
    case Features::capped: return launch_row_gradient_with<Element, Features::capped>(op, arguments, device, stream);
  }
}

template <class Element>
void launch_scale_rows(const char* op, RowArguments arguments, const DeviceLimits&, Stream stream) {
  const LaunchShape shape = elementwise_shape<Element>(arguments);
  launch(op, scale_rows_kernel<Element>, shape, stream, arguments);
}

template <class Element>
constexpr SoftmaxRowsLaunchers kSoftmaxRowsLaunchers = {launch_row_loss<Element>, launch_row_gradient<Element>,
                                                       launch_scale_rows<Element>};

}  // namespace ava
