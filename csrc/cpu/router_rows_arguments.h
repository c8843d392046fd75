// Between the operators (torch) and the router kernels (one file per instruction set, no torch, no standard library).
#pragma once
#include <stdint.h>

#include "../element_type.h"
#include "../row_layout.h"

namespace ava {

// Real below is double for float64 logits, else float. Pointers that an operator does not use are null.
struct RouterRowsArguments {
  ElementType element_type;
  int64_t n_experts, n_rows, k;
  bool is_sigmoid;
  const bool* row_mask;  // [n_layers, n_rows]: rows that count; null: all
  int64_t mask_stride;   // of the layers; 0: one mask for all
  const int64_t* order;  // [n_rows]: rows sorted by segment; null: as they are
  // [n_layers, n_rows, k]: one of the two where choices are given
  const int64_t* wide_indices;
  const int32_t* indices;
  const void* expert_bias;  // Real [n_layers, n_experts]
  uint8_t* new_choice;      // [n_layers, n_rows, bytes_of_choice], zeros: for own choices, where none are given
  // of the backward: own choices, and upstream gradients of the groups
  const uint8_t* choice;
  const void* grad_probability;  // Real [n_groups, n_experts]
  const void* grad_importance;   // Real [n_groups, n_experts]
  const void* grad_lse_squared;  // Real [n_groups]
  const void* grad_entropy;      // Real [n_groups]
  void* grad_logits;             // [n_layers, n_rows, n_experts], dense
};

// Some rows of one group.
struct RouterBlock {
  const void* logits;  // of the layer: [n_rows, n_experts] through the layout
  const RowLayout* layout;
  int64_t layer, group;
  int64_t begin, end;  // places in `order`
};

// Sums over the rows of a block.
struct RouterSums {
  double* vectors;  // [2, n_experts]: probability, importance
  double* scalars;  // [2]: lse^2, entropy
  int64_t* counts;  // [n_experts + 1]: choices; rows
  int64_t bad_row;  // the first row with an index out of range; -1: none
};

using RouterMeasure = void (*)(const RouterRowsArguments&, const RouterBlock&, RouterSums&, void* scratch);
using RouterDifferentiate = void (*)(const RouterRowsArguments&, const RouterBlock&, void* scratch);

struct RouterRowsKernels {
  RouterMeasure measure;
  RouterDifferentiate differentiate;
};

// 13 vectors of n_experts Reals, each padded to whole registers
inline int64_t router_scratch_bytes(int64_t n_experts) { return (n_experts + 16) * 13 * 8; }

extern const RouterRowsKernels router_rows_portable, router_rows_avx2, router_rows_avx512;

}  // namespace ava
