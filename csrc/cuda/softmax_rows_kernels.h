// Between the operators (torch) and the row kernels (one file for each type of logits, free of torch).
#pragma once
#include "dialect.cuh"
#include "softmax_rows_arguments.h"

namespace ava {

// Each takes raw pointers and at least one row, and returns before the kernel has run.
struct SoftmaxRowsLaunchers {
  using Launcher = void (*)(const char* op, RowArguments, const DeviceLimits&, Stream);
  Launcher row_loss;      // statistics, terms, and the gradient where grad_logits is not null; or the summaries
  Launcher row_gradient;  // the gradient from statistics and coefficients
  Launcher scale_rows;    // grad_logits *= row_weights, where those are not 1
};

extern const SoftmaxRowsLaunchers softmax_rows_float32, softmax_rows_bfloat16, softmax_rows_float16,
    softmax_rows_float64;

}  // namespace ava
