// Argument checks of the operators: a message says what was expected and what came.
#pragma once
#include <string>
#include <vector>

#include "box.h"
#include "element_type.h"
#include "error.h"
#include "torch_stable.h"

namespace ava {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_string(const std::vector<int64_t>& sizes) {
  std::string text = "[";
  for (size_t dim = 0; dim < sizes.size(); ++dim) text += (dim ? ", " : "") + std::to_string(sizes[dim]);
  return text + "]";
}
inline std::vector<int64_t> shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return std::vector<int64_t>(sizes.begin(), sizes.end());
}
inline std::string shape_string(const Tensor& tensor) { return shape_string(shape_of(tensor)); }
inline const char* type_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Long: return "int64";
    case ScalarType::Int: return "int32";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Bool: return "bool";
    default: return "another type";
  }
}

// `tensor` has this shape and type
inline void check_tensor(const char* op, const char* name, const Tensor& tensor, const std::vector<int64_t>& shape,
                         ScalarType type) {
  AVA_CHECK(shape_of(tensor) == shape, op, ": expected ", name, " of shape ", shape_string(shape), ", got ",
            shape_string(tensor));
  AVA_CHECK(tensor.scalar_type() == type, op, ": expected ", name, " of type ", type_name(type), ", got ",
            type_name(tensor.scalar_type()));
}

inline std::string device_name(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  return tensor.is_cuda() ? "cuda:" + std::to_string(tensor.get_device_index()) : "another device";
}
inline void check_device(const char* op, const char* name, const Tensor& tensor, const Tensor& like) {
  AVA_CHECK(tensor.device() == like.device(), op, ": expected ", name, " on ", device_name(like), ", got ",
            device_name(tensor));
}
// this shape and type, and where `like` is
inline void check_beside(const char* op, const char* name, const Tensor& tensor, const std::vector<int64_t>& shape,
                         ScalarType type, const Tensor& like) {
  check_tensor(op, name, tensor, shape, type);
  check_device(op, name, tensor, like);
}

// float64 beside float64 logits, else float32: the type of statistics, terms, coefficients and weights
inline ScalarType accumulation_type(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline ElementType element_type(const char* op, const Tensor& logits) {
  switch (logits.scalar_type()) {
    case ScalarType::Float: return ElementType::f32;
    case ScalarType::BFloat16: return ElementType::bf16;
    case ScalarType::Half: return ElementType::f16;
    case ScalarType::Double: return ElementType::f64;
    default:
      AVA_CHECK(false, op, ": expected logits of type float32, bfloat16, float16 or float64, got ",
                type_name(logits.scalar_type()));
      return ElementType::f32;
  }
}

// of ids, which kernels read in either
inline ScalarType index_type(const char* op, const char* name, const Tensor& ids) {
  const ScalarType type = ids.scalar_type();
  AVA_CHECK(type == ScalarType::Int || type == ScalarType::Long, op, ": expected ", name,
            " of type int32 or int64, got ", type_name(type));
  return type;
}

// logits [..., n_columns] with last stride 1, and the vocabulary within its columns
inline void check_logits(const char* op, const Tensor& logits, int64_t vocab_size) {
  element_type(op, logits);
  AVA_CHECK(logits.dim() >= 1, op, ": expected logits of shape [..., n_columns], got a scalar");
  const int64_t n_columns = logits.size(logits.dim() - 1);
  AVA_CHECK(vocab_size >= 1 && vocab_size <= n_columns, op, ": expected vocab_size in [1, ", n_columns,
            "] for logits of shape ", shape_string(logits), ", got ", vocab_size);
  AVA_CHECK(vocab_size < (int64_t(1) << 24), op, ": expected vocab_size below 2^24, got ", vocab_size);
  AVA_CHECK(n_columns == 1 || logits.stride(logits.dim() - 1) == 1, op, ": expected logits with last stride 1, got ",
            logits.stride(logits.dim() - 1));
}

}  // namespace ava
