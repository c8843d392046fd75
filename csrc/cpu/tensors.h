// New CPU tensors, straight from the C interface: a kernel makes several, and each call through the dispatcher costs a
// microsecond.
#pragma once
#include <vector>

#include "../error.h"
#include "../gradient_layout.h"

namespace ava {

inline int32_t shim_type(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return aoti_torch_dtype_float32();
    case ScalarType::Double: return aoti_torch_dtype_float64();
    case ScalarType::BFloat16: return aoti_torch_dtype_bfloat16();
    case ScalarType::Half: return aoti_torch_dtype_float16();
    case ScalarType::Int: return aoti_torch_dtype_int32();
    case ScalarType::Byte: return aoti_torch_dtype_uint8();
    default: return aoti_torch_dtype_int64();
  }
}

inline Tensor empty_tensor(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, ScalarType type) {
  AtenTensorHandle handle = nullptr;
  const auto error = aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), shim_type(type),
                                              aoti_torch_device_type_cpu(), 0, &handle);
  if (error != TORCH_SUCCESS) fail_out_of_memory("a new tensor");  // the one thing that can be wrong here
  return Tensor(handle);
}
inline Tensor empty_tensor(const std::vector<int64_t>& sizes, ScalarType type) {
  return empty_tensor(sizes, contiguous_strides(sizes), type);
}
inline Tensor empty_tensor(const TensorLayout& layout, ScalarType type) {
  if (layout.offset == 0) return empty_tensor(layout.sizes, layout.strides, type);
  return with_layout(empty_tensor({layout.n_elements()}, type), layout);
}

}  // namespace ava
