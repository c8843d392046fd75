// Weights of rows on the CPU: one call in place of some ten operators. One thread: rows are few beside their logits.
#include "../row_weights_operators.h"
#include "tensors.h"

namespace ava {
namespace {

struct CpuRowWeights {
  static Tensor new_tensor(const Tensor&, const std::vector<int64_t>& sizes, ScalarType type) {
    return empty_tensor(sizes, type);
  }

  template <class Real>
  static void run(const Tensor&, const RowWeights<Real>& rows) {
    RowSums sums{};
    for (int64_t sequence = 0; sequence < rows.batch_size; ++sequence)
      for (int64_t position = 0; position < rows.n_tokens; ++position) sums.add(sums_of_row(rows, sequence, position));
    *rows.n_counted = Real(sums.n_counted);
    const Real n = denominator(rows, sums);
    for (int64_t sequence = 0; sequence < rows.batch_size; ++sequence)
      for (int64_t position = 0; position < rows.n_tokens; ++position) write_row(rows, sequence, position, n);
  }
};

}  // namespace
}  // namespace ava

STABLE_TORCH_LIBRARY_IMPL(ava_ext, CPU, m) { m.impl("count_rows", AVA_BOX(&ava::count_rows<ava::CpuRowWeights>)); }
