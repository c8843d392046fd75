// What the router kernels are given, and which rows a block takes.
#pragma once
#include <type_traits>

#include "../router_rows.h"
#include "../row_layout.h"
#include "primitives.cuh"

namespace ava {

constexpr int kRouterThreads = 256, kRouterWarps = kRouterThreads / 32;
constexpr int kLayersPerLaunch = 256;  // addresses that travel as arguments; a launch takes 4 KB

// Statistics of a row that is too long for registers.
template <class Real>
struct WideRouterRow {
  RouterRow<Real> row;             // of y
  Real max_logit, rest_of_logits;  // of z
};

// Rows of one group: places [begin, end) in the order.
struct RouterSlot {
  int64_t segment, begin, end;
};

// Pointers that a pass does not use are null.
template <class Real>
struct RouterArguments {
  const void* logits[kLayersPerLaunch];  // of each layer: [n_rows, n_experts] through the layout
  RowLayout layout;
  int64_t first_layer;  // of this launch
  int64_t n_rows, n_experts, k, n_segments;
  int64_t rows_in_slot, n_slots;  // of a layer
  const bool* row_mask;           // [n_layers, n_rows]: rows that count; null: all
  int64_t mask_stride;            // of the layers; 0: one mask for all
  const int64_t* order;           // [n_rows]: rows sorted by segment; null: as they are, one segment
  const int64_t* segment_starts;  // [n_segments + 2]: places; the last but one is of rows without a segment
  // [n_layers, n_rows, k]: one of the two where choices are given
  const int64_t* wide_indices;
  const int32_t* indices;
  // of the forward
  const Real* expert_bias;         // [n_layers, n_experts]
  uint8_t* new_choice;             // [n_layers, n_rows, bytes_of_choice]: own choices, where none are given
  WideRouterRow<Real>* wide_rows;  // [n_layers, n_rows]: where a row is too long for registers
  Real* sums;                      // [n_layers, n_slots, 2 n_experts + 2]: probability, importance, lse^2, entropy
  int32_t* counts;                 // [n_layers, n_slots, n_experts + 1]: choices, rows
  // of the backward: own choices, and upstream gradients of the groups
  const uint8_t* choice;         // [n_layers, n_rows, bytes_of_choice]
  const Real* grad_probability;  // [n_layers * n_segments, n_experts]
  const Real* grad_importance;   // [n_layers * n_segments, n_experts]
  const Real* grad_lse_squared;  // [n_layers * n_segments]
  const Real* grad_entropy;      // [n_layers * n_segments]
  void* grad_logits;             // [n_layers, n_rows, n_experts], dense

  __device__ int64_t row_at(int64_t place) const { return order ? order[place] : place; }
  __device__ bool counts_row(int64_t layer, int64_t row) const {
    return !row_mask || row_mask[layer * mask_stride + row];
  }
  bool is_given() const { return wide_indices || indices; }  // the choice
  __device__ int64_t choice_at(int64_t layer, int64_t row, int64_t slot) const {
    const int64_t at = (layer * n_rows + row) * k + slot;
    return wide_indices ? wide_indices[at] : indices[at];
  }
  // at most n_segments, which stands for the rows without one
  __device__ RouterSlot segment_rows(int64_t segment) const {
    if (!segment_starts) return {segment, 0, n_rows};
    return {segment, segment_starts[segment], segment_starts[segment + 1]};
  }
  // floor(start / rows_in_slot) + segment: from there to the next segment's there is room for all rows between
  __device__ int64_t first_slot(int64_t segment) const {
    return segment_starts ? segment_starts[segment] / rows_in_slot + segment : 0;
  }
  // The rows of a slot; begin >= end: none.
  __device__ RouterSlot rows_of_slot(int64_t slot) const {
    int64_t segment = 0;  // the last one that starts at or before the slot
    if (segment_starts)
      for (int64_t beyond = n_segments + 1; beyond - segment > 1;) {
        const int64_t middle = (segment + beyond) / 2;
        (first_slot(middle) <= slot ? segment : beyond) = middle;
      }
    RouterSlot rows = segment_rows(segment);
    rows.begin += (slot - first_slot(segment)) * rows_in_slot;
    if (rows.end > rows.begin + rows_in_slot) rows.end = rows.begin + rows_in_slot;
    return rows;
  }
};

// Sums of the groups, on the device.
template <class Real>
struct RouterGroupSums {
  Real* probability;  // [n_groups, n_experts]
  Real* importance;   // [n_groups, n_experts]
  Real* lse_squared;  // [n_groups]
  Real* entropy;      // [n_groups]
  int64_t* counts;    // [n_groups, n_experts]
  int64_t* n_rows;    // [n_groups]
};

}  // namespace ava
