// add_weight_gradient_: checks, threads and groups of rows. The arithmetic, and why, is in weight_gradient.h.
#include "weight_gradient.h"

#include <algorithm>
#include <atomic>
#include <memory>

#include "../checks.h"
#include "capability.h"
#include "threads.h"

namespace ava {
namespace {

const WeightGradientKernels* kernels() {
#ifdef AVA_X86
  if (cpu_capability() == CpuCapability::avx512 && __builtin_cpu_supports("avx512bf16"))
    return &weight_gradient_avx512bf16;
#endif
  return nullptr;
}

bool has_bfloat16_products() { return kernels() != nullptr; }

// grad_weight += the product of arguments.n_rows <= kMostRows rows. packed_states: [n_hidden_tiles, n_pairs, 2]
void add_rows(const WeightGradientKernels& kernels, const WeightGradientArguments& arguments,
              PackedPairs* packed_states) {
  parallel_for(n_hidden_tiles_of(arguments), 1,
               [&](int64_t begin, int64_t end) { kernels.pack_states(arguments, begin, end, packed_states); });
  const int64_t n_pairs = n_pairs_of(arguments), n_tiles = n_column_tiles_of(arguments);
  const int64_t tiles_at_once = std::max<int64_t>(1, kGradientBytes / (n_pairs * int64_t(sizeof(PackedPairs))));
  const int64_t n_blocks = divided_up(n_tiles, tiles_at_once);
  // threads take one block after another: some are done sooner
  std::atomic<int64_t> next_block{0};
  const int64_t n_threads = std::min<int64_t>(n_blocks, torch::stable::get_num_threads());
  in_threads(n_threads, [&] {
    const std::unique_ptr<PackedPairs[]> packed_gradient(new PackedPairs[tiles_at_once * n_pairs]);
    for (int64_t block; (block = next_block.fetch_add(1)) < n_blocks;)
      kernels.add_columns(arguments, block * tiles_at_once, std::min(n_tiles, (block + 1) * tiles_at_once),
                          packed_states, packed_gradient.get());
  });
}

void check_matrix(const char* op, const char* name, const Tensor& matrix) {
  AVA_CHECK(matrix.dim() == 2, op, ": expected ", name, " of two dimensions, got shape ", shape_string(matrix));
  AVA_CHECK(matrix.size(1) <= 1 || matrix.stride(1) == 1, op, ": expected ", name, " with last stride 1, got ",
            matrix.stride(1));
}

void add_weight_gradient_(const Tensor& grad_weight,      // [n_columns, hidden_size]
                          const Tensor& grad_logits,      // [n_rows, n_columns]
                          const Tensor& hidden_states) {  // [n_rows, hidden_size]
  const char* op = "add_weight_gradient_";
  check_matrix(op, "grad_logits", grad_logits);
  check_matrix(op, "hidden_states", hidden_states);
  const int64_t n_rows = grad_logits.size(0), n_columns = grad_logits.size(1), hidden_size = hidden_states.size(1);
  check_tensor(op, "grad_logits", grad_logits, {n_rows, n_columns}, ScalarType::BFloat16);
  check_tensor(op, "hidden_states", hidden_states, {n_rows, hidden_size}, ScalarType::BFloat16);
  check_tensor(op, "grad_weight", grad_weight, {n_columns, hidden_size}, ScalarType::Float);
  AVA_CHECK(grad_weight.is_contiguous(), op, ": expected a contiguous grad_weight");
  AVA_CHECK(has_bfloat16_products(), op,
            ": expected a processor with AVX512-BF16, and AVA_CPU_CAPABILITY not below avx512");
  WeightGradientArguments arguments{};
  arguments.grad_weight = static_cast<float*>(grad_weight.mutable_data_ptr());
  arguments.grad_logits = static_cast<const BFloat16*>(grad_logits.const_data_ptr());
  arguments.hidden_states = static_cast<const BFloat16*>(hidden_states.const_data_ptr());
  arguments.grad_logits_stride = grad_logits.stride(0);
  arguments.hidden_states_stride = hidden_states.stride(0);
  arguments.n_columns = n_columns;
  arguments.hidden_size = hidden_size;
  if (n_rows == 0 || n_columns == 0 || hidden_size == 0) return;
  // groups of equal size, and of whole pairs
  const int64_t rows_at_once = 2 * divided_up(n_rows, 2 * divided_up(n_rows, kMostRows));
  const std::unique_ptr<PackedPairs[]> packed_states(new PackedPairs[n_hidden_tiles_of(arguments) * rows_at_once]);
  for (int64_t row = 0; row < n_rows; row += rows_at_once) {
    arguments.n_rows = std::min(rows_at_once, n_rows - row);
    add_rows(*kernels(), arguments, packed_states.get());
    arguments.grad_logits += rows_at_once * arguments.grad_logits_stride;
    arguments.hidden_states += rows_at_once * arguments.hidden_states_stride;
  }
}

}  // namespace
}  // namespace ava

STABLE_TORCH_LIBRARY_IMPL(ava_ext, CPU, m) { m.impl("add_weight_gradient_", AVA_BOX(&ava::add_weight_gradient_)); }
STABLE_TORCH_LIBRARY_IMPL(ava_ext, CompositeExplicitAutograd, m) {
  m.impl("has_bfloat16_products", AVA_BOX(&ava::has_bfloat16_products));
}
