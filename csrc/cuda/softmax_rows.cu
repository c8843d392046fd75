// The row family on CUDA: memory and launches. The operators are in ../softmax_rows_operators.h. Ids out of range are a
// device assert of the kernels, as in torch: nothing here waits for the device.
//
// Where to read on, from the simple to the fast:
//
//   ../softmax_rows.h                the formulas of one row
//   softmax_rows_scalar.cuh          float64, weights of columns, ranks: a block for a row, one column after another;
//                                    what the rest does faster
//   softmax_rows_sparse.cuh          target, candidates, terms and outputs of a row: one warp, in every kernel
//   softmax_rows_slice.cuh           how a row is cut into 16-byte vectors, and where a thread keeps its share
//   softmax_rows_exponent.cuh        e^u of a logit
//   softmax_rows_measure.cuh         sums over vectors, and the gradient of one
//   softmax_rows_exchange.cuh        how the warps that share a row, in one block or in several, learn of each other's
//   softmax_rows_refill.cuh          the gradient of a row, whose place the next row takes meanwhile
//   softmax_rows_kernels.cuh         row_loss and row_statistics: one read and one write of the row
//   softmax_rows_short.cuh           the same, where a warp takes several short rows at once
//   softmax_rows_elementwise.cuh     row_gradient and scale_rows_
//   softmax_rows_plan.h              which of the kernels a row is for;  softmax_rows_launch.cuh starts it
#include "../softmax_rows_operators.h"

#include "../gradient_layout.h"
#include "../new_tensor.h"
#include "launch.h"
#include "softmax_rows_arguments.h"

namespace ava {
namespace {

constexpr int64_t kMostIds = 1024;  // for a row; they wait in shared memory

const SoftmaxRowsLaunchers& launchers(ElementType type) {
  switch (type) {
    case ElementType::f32: return softmax_rows_float32;
    case ElementType::bf16: return softmax_rows_bfloat16;
    case ElementType::f16: return softmax_rows_float16;
    default: return softmax_rows_float64;
  }
}

struct CudaRows {
  using Arguments = RowArguments;
  using Kernels = SoftmaxRowsLaunchers;

  static void check_size(const char* op, int64_t n_rows, int64_t n_columns) {
    AVA_CHECK(n_rows < int64_t(1) << 31, op, ": expected fewer than 2^31 rows, got ", n_rows);
    AVA_CHECK(n_columns < int64_t(1) << 28, op, ": expected fewer than 2^28 columns, got ", n_columns);
  }
  static void check_n_ids(const char* op, int64_t n_ids) {
    AVA_CHECK(n_ids <= kMostIds, op, ": expected at most ", kMostIds, " ids for a row, got ", n_ids);
  }
  static void check_targets(const RowCall<CudaRows>&) {}  // the kernels do
  static void set_ids(RowCall<CudaRows>& call, const char*, const Tensor& ids) {
    call.arguments.ids = static_cast<const int32_t*>(ids.const_data_ptr());
    call.arguments.ids_are_wide = ids.scalar_type() == ScalarType::Long;
  }
  static Tensor new_tensor(const Tensor& logits, const std::vector<int64_t>& sizes, ScalarType type) {
    return ava::new_tensor(logits, sizes, type);
  }
  static Tensor new_gradient(const Tensor& logits) {
    const TensorLayout layout = gradient_layout(logits);
    return with_layout(new_tensor(logits, {layout.n_elements()}, logits.scalar_type()), layout);
  }
  static void set_groups(const char* op, Arguments& arguments, const std::vector<int64_t>& sizes) {
    AVA_CHECK(sizes.size() <= kMostGroups, op, ": expected at most ", kMostGroups, " groups of candidates, got ",
              sizes.size());
    for (const int64_t size : sizes) arguments.group_sizes[arguments.n_groups++] = int32_t(size);
  }
  static void run(const char* op, const Tensor& logits, const Arguments& arguments,
                  Kernels::Launcher Kernels::* kernel) {
    const DeviceScope device(logits);
    (launchers(element_type(op, logits)).*kernel)(op, arguments, device.limits(), device.stream());
  }
};

}  // namespace
}  // namespace ava

AVA_CUDA_OPERATORS(m) { ava::RowOperators<ava::CudaRows>::register_all(m); }
