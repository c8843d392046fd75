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

AVA_HOST_DEVICE int64_t row_offset(const RowLayout& layout, int64_t row) {
  int64_t offset = 0;
  for (int dim = layout.n_dims - 1; dim > 0; --dim) {
    offset += row % layout.sizes[dim] * layout.strides[dim];
    row /= layout.sizes[dim];
  }
  return layout.n_dims ? offset + row * layout.strides[0] : 0;
}

}  // namespace AVA_ISA
}  // namespace ava
