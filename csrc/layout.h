// How the rows of a tensor lie in memory: the layout (row_layout.h) that the kernels are given.
#pragma once
#include <optional>
#include <vector>

#include "checks.h"
#include "row_layout.h"

namespace ava {

// The rows of [..., n_columns] from first_dim on: a layer of [n_layers, ..., n_experts] has first_dim = 1. Dimensions
// that follow each other in memory become one.
inline RowLayout layout_of(const char* op, const char* name, const Tensor& tensor, int64_t first_dim = 0) {
  RowLayout layout{};
  for (int64_t dim = first_dim; dim + 1 < tensor.dim(); ++dim) {
    const int64_t size = tensor.size(dim), stride = tensor.stride(dim);
    if (size == 1) continue;
    const int last = layout.n_dims - 1;
    if (last >= 0 && layout.strides[last] == size * stride) {
      layout.sizes[last] *= size;
      layout.strides[last] = stride;
      continue;
    }
    AVA_CHECK(layout.n_dims < kMostLeadingDims, op, ": expected ", name, " with at most ", kMostLeadingDims,
              " leading strides");
    layout.sizes[layout.n_dims] = size;
    layout.strides[layout.n_dims++] = stride;
  }
  return layout;
}

// Tensors whose elements kernels read one after another. They live as long as this.
struct DenseTensors {
  std::vector<Tensor> kept;

  const void* dense(const Tensor& tensor) {
    kept.push_back(tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor));
    return kept.back().const_data_ptr();
  }
  const void* dense(const std::optional<Tensor>& tensor) { return tensor ? dense(*tensor) : nullptr; }
};

inline std::vector<int64_t> contiguous_strides(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t dim = sizes.size(); dim-- > 0; stride *= sizes[dim] > 1 ? sizes[dim] : 1) strides[dim] = stride;
  return strides;
}

inline int64_t n_rows_of(const Tensor& tensor) {  // [..., n_columns]
  int64_t n_rows = 1;
  for (int64_t dim = 0; dim + 1 < tensor.dim(); ++dim) n_rows *= tensor.size(dim);
  return n_rows;
}

}  // namespace ava
