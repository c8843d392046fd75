// New CPU tensors, straight from the C interface: a kernel makes several, and each call through the dispatcher costs a
// microsecond.
#pragma once
#include <vector>

#include "../error.h"
#include "../torch_stable.h"

namespace ava {

inline int32_t shim_type(torch::headeronly::ScalarType type) {
  using torch::headeronly::ScalarType;
  switch (type) {
    case ScalarType::Float: return aoti_torch_dtype_float32();
    case ScalarType::Double: return aoti_torch_dtype_float64();
    case ScalarType::BFloat16: return aoti_torch_dtype_bfloat16();
    case ScalarType::Half: return aoti_torch_dtype_float16();
    case ScalarType::Int: return aoti_torch_dtype_int32();
    default: return aoti_torch_dtype_int64();
  }
}

inline std::vector<int64_t> contiguous_strides(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t dim = sizes.size(); dim-- > 0; stride *= sizes[dim] > 1 ? sizes[dim] : 1) strides[dim] = stride;
  return strides;
}

inline torch::stable::Tensor empty_tensor(const std::vector<int64_t>& sizes, torch::headeronly::ScalarType type) {
  AtenTensorHandle handle = nullptr;
  const auto error = aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), contiguous_strides(sizes).data(),
                                              shim_type(type), aoti_torch_device_type_cpu(), 0, &handle);
  if (error != TORCH_SUCCESS) fail_out_of_memory("a new tensor");  // the one thing that can be wrong here
  return torch::stable::Tensor(handle);
}

}  // namespace ava
