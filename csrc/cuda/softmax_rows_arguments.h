// Between the operators (torch) and the row kernels (one file for each type of logits, free of torch): what the
// operators hand to the kernels, what those keep in shared memory besides the row, and the table of launchers.
#pragma once
#include "../row_layout.h"
#include "../softmax_rows.h"
#include "dialect.cuh"

namespace ava {

constexpr int kMostGroups = 32;

// Real below is double for float64 logits, else float. Pointers that an operator does not use are null.
struct RowArguments {
  const void* logits;  // [n_rows, n_columns] through its layout
  RowLayout logits_layout;
  void* grad_logits;  // [n_rows, n_columns] through its layout; may be the logits themselves; null: no gradient
  RowLayout grad_layout;
  const void* options;  // RowOptions<Real>

  const void* column_weights;  // q: logits' type, or Real; [n_rows, vocab_size] through its layout
  RowLayout column_weights_layout;
  bool column_weights_are_real;

  const int64_t* targets;  // [n_rows]
  int64_t ignore_index;
  const bool* row_mask;     // [n_rows]: rows to measure; null: all
  const void* row_weights;  // Real [n_rows]
  // [n_rows, n_ids]: candidates, or the columns that have an s_c; -1: absent. Of 32 bits, or of 64 in two words
  const int32_t* ids;
  int32_t ids_are_wide;   // 0 or 1
  const void* id_values;  // Real [n_rows, n_ids]: weights of the candidates

  void* row_loss;    // Real [n_rows]
  void* row_terms;   // Real [kRowTerms + n_groups, n_rows], and kRankTerms more
  void* statistics;  // RowStatistics<Real> [n_rows]: output, or input of the gradient kernels
  // RowCoefficients<Real> and then the s_c. Output of row_loss, [n_rows, kRowCoefficients + 1 + n_ids], of the target
  // and the candidates; input of the gradient kernels, [n_rows, kRowCoefficients + n_ids], of the ids
  void* row_coefficients;
  void* id_log_probs;  // Real [n_rows, n_ids]
  void* summaries;     // Real [kRowSummaries, n_rows]

  int64_t n_rows;
  int32_t n_columns, vocab_size;  // columns at or beyond vocab_size are padding
  int32_t n_ids, n_groups;
  int32_t group_sizes[kMostGroups];  // the candidates of a row are reported in these groups
  int32_t flags;                     // RowFlags
  int32_t all_flags;                 // of the kernel of scalars, which evaluates the main term by itself

  // Of the plan. Here they are in constant memory, where they cost a kernel no registers.
  int32_t cluster_size;   // parts that a row is cut into, one for each block
  int32_t rows_at_once;   // of a warp that has whole rows
  int32_t capacity;       // 16-byte vectors in a part at most
  int32_t n_slots;        // of them for a thread
  int32_t n_slots_first;  // of those in the first of two stages
  uint32_t row_step;      // rows that are worked on at the same time
};

// A column that may have an s_c of its own. Entry 0 of a row is its target, or, where coefficients are given, i*; the
// ids follow.
template <class Real>
struct SparseEntry {
  Real logit;      // as it is stored
  Real u;          // -inf: masked
  Real own;        // first the candidate's weight, then s_c
  Real loss;       // the candidate's penalty
  int32_t column;  // -1: absent
};

// What one warp finds out about a row for all others and for its own later use.
template <class Real>
struct RowScratch {
  RowStatistics<Real> statistics;
  RowEvaluation<Real> evaluation;  // the coefficients already by the row's weight
  DenseGradient<Real> dense;
  Real others, maximum;  // sums of s_c: without i*, at i*
};

// Each takes raw pointers and at least one row, and returns before the kernel has run.
struct SoftmaxRowsLaunchers {
  using Launcher = void (*)(const char* op, RowArguments, const DeviceLimits&, Stream);
  Launcher row_loss;        // statistics, terms, and the gradient where grad_logits is not null
  Launcher row_statistics;  // statistics and what the open operator reports of them
  Launcher row_gradient;    // the gradient from statistics and coefficients
  Launcher scale_rows;      // grad_logits *= row_weights, but for ignored rows
};

extern const SoftmaxRowsLaunchers softmax_rows_float32, softmax_rows_bfloat16, softmax_rows_float16,
    softmax_rows_float64;

}  // namespace ava
