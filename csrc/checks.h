// Argument checks of the operators, one check_<op>() per op: a message says what was expected and what came.
#pragma once
#include <string>

#include "torch_stable.h"

namespace ava {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_string(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) text += (dim ? ", " : "") + std::to_string(tensor.size(dim));
  return text + "]";
}

}  // namespace ava
