// Weights of rows on CUDA. The kernel is in row_weights.cuh.
#include "row_weights.cuh"

#include "../new_tensor.h"
#include "../row_weights_operators.h"
#include "launch.h"

namespace ava {
namespace {

struct CudaRowWeights {
  static Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type) {
    return ava::new_tensor(like, sizes, type);
  }

  template <class Real>
  static void run(const Tensor& targets, const RowWeights<Real>& rows) {
    const DeviceScope device(targets);
    row_weights(rows, device.stream());
  }
};

}  // namespace
}  // namespace ava

AVA_CUDA_OPERATORS(m) { m.impl("count_rows", AVA_BOX(&ava::count_rows<ava::CudaRowWeights>)); }
