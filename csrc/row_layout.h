// Where row i of a tensor [..., n_columns] starts: any leading strides, so that a slice is read in place. Free of
// torch.
#pragma once
#include <stdint.h>

#include "element_type.h"

namespace ava {

constexpr int kMostLeadingDims = 8;

struct RowLayout {
  int n_dims;  // leading dimensions, merged where they are contiguous
  int64_t sizes[kMostLeadingDims];
  int64_t strides[kMostLeadingDims];  // in elements
};

inline namespace AVA_ISA {

// Index: the type of row numbers; a GPU divides 32 bits many times faster than 64
template <class Index>
AVA_HOST_DEVICE int64_t row_offset(const RowLayout& layout, Index row) {
  int64_t offset = 0;
  for (int dim = layout.n_dims - 1; dim > 0; --dim) {
    const Index size = Index(layout.sizes[dim]);
    offset += int64_t(row % size) * layout.strides[dim];
    row /= size;
  }
  return layout.n_dims ? offset + int64_t(row) * layout.strides[0] : 0;
}

}  // namespace AVA_ISA
}  // namespace ava
