// Between the operators (torch) and the row kernels (one file per instruction set, no torch, no standard library).
#pragma once
#include <stdint.h>

#include "../element_type.h"
#include "../row_layout.h"

namespace ava {

// Real below is double for float64 logits, else float. Pointers that an operator does not use are null.
struct SoftmaxRowsArguments {
  ElementType element_type;
  int64_t vocab_size, n_columns;  // columns at or beyond vocab_size are padding
  int64_t flags;                  // RowFlags
  const void* options;            // RowOptions<Real>

  const void* logits;  // [n_rows, n_columns] through its layout
  RowLayout logits_layout;
  void* grad_logits;  // [n_rows, n_columns] through its layout; may be the logits themselves
  RowLayout grad_layout;
  bool stream;  // write the gradient past the caches

  const void* column_weights;  // q: logits' type, or Real; [n_rows, vocab_size] through its layout
  RowLayout column_weights_layout;
  bool column_weights_are_real;

  const int64_t* targets;  // [n_rows]
  int64_t ignore_index;
  const void* row_weights;  // Real [n_rows]
  const bool* row_mask;     // [n_rows]: rows to measure; null: all
  const int32_t* ids;       // [n_rows, n_ids]: candidates, or the columns that have an s_c; -1: absent, kTailId
  const void* id_values;    // Real [n_rows, n_ids]: weights of the candidates
  int64_t n_ids;
  const int64_t* group_sizes;  // [n_groups]: the candidates of a row are reported in these groups
  int64_t n_groups;

  void* row_loss;    // Real [n_rows]
  void* row_terms;   // Real [kRowTerms + n_groups, n_rows], and kRankTerms more
  int64_t n_rows;    // stride of row_terms
  void* statistics;  // RowStatistics<Real> [n_rows]: output, or input of row_gradient
  // RowCoefficients<Real> and then the s_c. Output of row_loss, [n_rows, kRowCoefficients + 1 + n_ids], of the target
  // and the candidates; input of row_gradient, [n_rows, kRowCoefficients + n_ids], of the ids
  void* row_coefficients;
  void* id_log_probs;  // Real [n_rows, n_ids]
  void* summaries;     // Real [kRowSummaries, n_rows]
};

// Rows [row_begin, row_end); scratch holds sparse_scratch_bytes(n_ids).
using SoftmaxRowsKernel = void (*)(const SoftmaxRowsArguments&, int64_t row_begin, int64_t row_end, void* scratch);

struct SoftmaxRowsKernels {
  SoftmaxRowsKernel row_loss;        // statistics, terms, and the gradient while the row is in cache
  SoftmaxRowsKernel row_statistics;  // statistics and what the open operator reports of them
  SoftmaxRowsKernel row_gradient;    // the gradient from statistics and coefficients
  SoftmaxRowsKernel scale_rows;      // grad_logits *= row_weights, but for ignored rows
};

// Room for the columns of a row that have an s_c (n_ids, the target, the maximum), and to find them by hashing where
// they are many.
constexpr int64_t kEntryBytes = 48, kMostUnhashed = 16;
inline int64_t slots_of_entries(int64_t n_ids) {
  int64_t n_slots = 32;
  while (n_slots < 2 * (n_ids + 2)) n_slots *= 2;
  return n_ids <= kMostUnhashed ? 0 : n_slots;
}
inline int64_t sparse_scratch_bytes(int64_t n_ids) { return (n_ids + 2) * kEntryBytes + slots_of_entries(n_ids) * 4; }

extern const SoftmaxRowsKernels softmax_rows_portable, softmax_rows_avx2, softmax_rows_avx512;

}  // namespace ava
