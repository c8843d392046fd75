// Starts the kernels for one type of logits. Included once by each softmax_rows_<type>.cu.
#pragma once
#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>

#include "softmax_rows_elementwise.cuh"
#include "softmax_rows_plan.h"
#include "softmax_rows_scalar.cuh"

namespace ava {

// A cluster. A grid is a multiple of it.
inline LaunchShape shape_of(const RowPlan& plan) {
  LaunchShape shape{};
  shape.block = dim3(unsigned(plan.n_threads));
  shape.shared_bytes = plan.shared_bytes;
  shape.cluster_size = unsigned(plan.cluster_size);
  shape.grid = dim3(shape.cluster_size);
  return shape;
}

// How many clusters the device really places: it cuts them from groups of multiprocessors of various sizes. A
// persistent cluster that had to wait for the others would come on top of all their time. Asked once for each shape.
inline int placed_clusters(const char* op, void (*kernel)(RowArguments), const RowPlan& plan,
                           const DeviceLimits& device) {
  const LaunchShape shape = shape_of(plan);
  using Key = std::tuple<void (*)(RowArguments), const DeviceLimits*, unsigned, size_t, unsigned>;
  static std::mutex mutex;
  static std::map<Key, int> placed;
  const std::lock_guard<std::mutex> lock(mutex);
  const Key key{kernel, &device, shape.block.x, shape.shared_bytes, shape.cluster_size};
  const auto found = placed.find(key);
  if (found != placed.end()) return found->second;
  return placed[key] = resident_clusters(op, kernel, shape);
}

// Persistent: a cluster takes one row after another and reads the next while it writes the last.
inline void launch_persistent(const char* op, void (*kernel)(RowArguments), const RowPlan& plan, RowArguments arguments,
                              const DeviceLimits& device, Stream stream) {
  LaunchShape shape = shape_of(plan);
  int64_t n_clusters = plan.clusters_at_once(device);
  if (plan.cluster_size > 1) n_clusters = std::min<int64_t>(placed_clusters(op, kernel, plan, device), n_clusters);
  int rows_at_once = plan.rows_at_once;
  while (rows_at_once > 1 && arguments.n_rows / rows_at_once < n_clusters) rows_at_once /= 2;  // work for every warp
  n_clusters = std::min(n_clusters, (arguments.n_rows + rows_at_once - 1) / rows_at_once);
  shape.grid = dim3(unsigned(n_clusters) * shape.cluster_size);
  arguments.cluster_size = plan.cluster_size;
  arguments.rows_at_once = rows_at_once;
  arguments.capacity = plan.capacity;
  arguments.n_slots = (plan.capacity + plan.n_threads - 1) / plan.n_threads;
  arguments.n_slots_first = (arguments.n_slots + 1) / 2;
  arguments.row_step = unsigned(n_clusters * rows_at_once);
  launch(op, kernel, shape, stream, arguments);
}

template <class Element, Features kFeatures>
void launch_row_loss_with(const char* op, const RowArguments& arguments, const DeviceLimits& device, Stream stream) {
  constexpr auto kInClusters = row_loss_kernel<Element, Residence::clusters, kFeatures>;
  DeviceLimits granted = device;  // of which a part, or code made for another kind, may grant less than it says
  RowPlan plan = plan_rows(arguments.n_columns, int(sizeof(Element)), arguments.n_ids, granted);
  while (plan.cluster_size > 1 && placed_clusters(op, kInClusters, plan, device) == 0) {
    granted.largest_cluster = plan.cluster_size / 2;
    plan = plan_rows(arguments.n_columns, int(sizeof(Element)), arguments.n_ids, granted);
  }
  const auto start = [&](void (*kernel)(RowArguments)) {
    launch_persistent(op, kernel, plan, arguments, device, stream);
  };
  switch (plan.residence) {
    case Residence::warp: return start(short_row_loss_kernel<Element, kFeatures>);
    case Residence::shared: return start(row_loss_kernel<Element, Residence::shared, kFeatures>);
    case Residence::clusters: return start(kInClusters);
    case Residence::streamed: return start(row_loss_kernel<Element, Residence::streamed, kFeatures>);
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
  return flags & kDenseFlags ? Features::dense : Features::plain;
}

template <class Element>
void launch_row_loss(const char* op, RowArguments arguments, const DeviceLimits& device, Stream stream) {
  if (arguments.flags & (kColumnWeightFlags | kRanks | kTail))
    return launch_scalar_rows<Element>(op, arguments, false, stream);
  switch (features_of(arguments.flags)) {
    case Features::plain: return launch_row_loss_with<Element, Features::plain>(op, arguments, device, stream);
    case Features::dense: return launch_row_loss_with<Element, Features::dense>(op, arguments, device, stream);
    case Features::capped: return launch_row_loss_with<Element, Features::capped>(op, arguments, device, stream);
  }
}

template <class Element>
void launch_row_gradient(const char* op, RowArguments arguments, const DeviceLimits& device, Stream stream) {
  if (arguments.flags & (kColumnWeightFlags | kTail)) return launch_scalar_rows<Element>(op, arguments, true, stream);
  switch (features_of(arguments.flags)) {
    case Features::plain: return launch_row_gradient_with<Element, Features::plain>(op, arguments, device, stream);
    case Features::dense: return launch_row_gradient_with<Element, Features::dense>(op, arguments, device, stream);
    case Features::capped: return launch_row_gradient_with<Element, Features::capped>(op, arguments, device, stream);
  }
}

template <class Element>
void launch_scale_rows(const char* op, RowArguments arguments, const DeviceLimits& device, Stream stream) {
  LaunchShape shape = elementwise_shape<Element>(arguments);
  const int64_t n_units = arguments.n_rows * arguments.cluster_size, at_once = 8 * int64_t(device.n_multiprocessors);
  shape.grid = dim3(unsigned(std::clamp<int64_t>(at_once, 1, n_units)));
  launch(op, scale_rows_kernel<Element>, shape, stream, arguments);
}

template <class Element>
constexpr SoftmaxRowsLaunchers kSoftmaxRowsLaunchers = {launch_row_loss<Element>, launch_row_loss<Element>,
                                                        launch_row_gradient<Element>, launch_scale_rows<Element>};

}  // namespace ava
