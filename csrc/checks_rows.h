// How the rows of logits lie in memory, from a tensor: what the row operators of every device begin with.
#pragma once
#include "checks.h"
#include "row_layout.h"

namespace ava {

inline int64_t rows_of(const Tensor& logits) {
  int64_t n_rows = 1;
  for (int64_t dim = 0; dim + 1 < logits.dim(); ++dim) n_rows *= logits.size(dim);
  return n_rows;
}

// dimensions that follow each other in memory become one
inline RowLayout layout_of(const char* op, const Tensor& tensor) {
  RowLayout layout{};
  for (int64_t dim = 0; dim + 1 < tensor.dim(); ++dim) {
    const int64_t size = tensor.size(dim), stride = tensor.stride(dim);
    if (size == 1) continue;
    const int last = layout.n_dims - 1;
    if (last >= 0 && layout.strides[last] == size * stride) {
      layout.sizes[last] *= size;
      layout.strides[last] = stride;
      continue;
    }
    STD_TORCH_CHECK(layout.n_dims < kMostLeadingDims, op, ": expected logits with at most ", kMostLeadingDims,
                    " leading strides");
    layout.sizes[layout.n_dims] = size;
    layout.strides[layout.n_dims++] = stride;
  }
  return layout;
}

}  // namespace ava
