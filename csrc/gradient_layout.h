// Where a new gradient of logits lies in memory. ava_ext/ops/gradient_layout.py says the same of the fakes, and
// tests/ops/test_gradient_layout.py holds the two together.
//
// Kernels move 16 bytes at once where a row of the gradient begins at the same place as its logits, modulo 16 bytes. A
// contiguous gradient of logits[:, :-1] with an odd number of columns does not: so it gets the strides of the logits,
// and the offset of their storage modulo 16 bytes. It stays contiguous
//
//   where that is as good: every stride of the two differs by a multiple of 16 bytes
//   where memory of the logits overlaps (expanded), or takes more than 9/8 of what its elements do
#pragma once
#include <algorithm>

#include "layout.h"

namespace ava {

// A tensor without its memory.
struct TensorLayout {
  std::vector<int64_t> sizes, strides;  // in elements
  int64_t offset;                       // of the first element in the storage

  int64_t n_elements() const {  // of the storage
    int64_t extent = 1;
    for (size_t dim = 0; dim < sizes.size(); ++dim) {
      if (sizes[dim] == 0) return offset;
      extent += (sizes[dim] - 1) * strides[dim];
    }
    return offset + extent;
  }
};

inline TensorLayout contiguous_layout(const std::vector<int64_t>& sizes) {
  return {sizes, contiguous_strides(sizes), 0};
}

// Whether elements do not overlap and lie close together.
inline bool is_compact(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  std::vector<size_t> dims;  // from the innermost on
  for (size_t dim = 0; dim < sizes.size(); ++dim)
    if (sizes[dim] != 1) dims.push_back(dim);
  std::sort(dims.begin(), dims.end(), [&](size_t one, size_t other) { return strides[one] < strides[other]; });
  int64_t extent = 1, n_elements = 1;  // of the dimensions inside
  for (const size_t dim : dims) {
    if (strides[dim] < extent || 8 * strides[dim] > 9 * n_elements) return false;
    extent = strides[dim] * sizes[dim];
    n_elements *= sizes[dim];
  }
  return true;
}

inline TensorLayout gradient_layout(const Tensor& logits) {  // [..., n_columns]
  TensorLayout layout = contiguous_layout(shape_of(logits));
  const int64_t in_16_bytes = 16 / int64_t(logits.element_size());
  std::vector<int64_t> strides(layout.sizes.size());
  bool begins_elsewhere = false;  // some row, modulo 16 bytes
  for (size_t dim = 0; dim < strides.size(); ++dim) {
    strides[dim] = logits.stride(int64_t(dim));
    begins_elsewhere |= layout.sizes[dim] != 1 && (strides[dim] - layout.strides[dim]) % in_16_bytes != 0;
  }
  if (begins_elsewhere && !is_compact(layout.sizes, strides)) return layout;
  if (begins_elsewhere) layout.strides = strides;
  layout.offset = logits.storage_offset() % in_16_bytes;
  return layout;
}

// The elements of one-dimensional memory with this layout.
inline Tensor with_layout(const Tensor& memory, const TensorLayout& layout) {
  AtenTensorHandle handle = nullptr;
  const auto error = aoti_torch__reinterpret_tensor(memory.get(), int64_t(layout.sizes.size()), layout.sizes.data(),
                                                    layout.strides.data(), layout.offset, &handle);
  AVA_CHECK(error == TORCH_SUCCESS, "ava_ext: torch has refused a layout of memory");
  return Tensor(handle);
}

}  // namespace ava
