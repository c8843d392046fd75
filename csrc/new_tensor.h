// New tensors by torch's dispatcher, and torch's own words where it refuses: out of memory above all.
#pragma once
#include <array>
#include <exception>
#include <optional>
#include <vector>

#include "checks.h"

// Since torch 2.13. Weak, so that this library also loads in older ones.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace ava {

inline void check_torch(const char* function, AOTITorchError error) {
  if (error == TORCH_SUCCESS) return;
  if (torch_exception_get_what_without_backtrace) fail(torch_exception_get_what_without_backtrace());
  fail(function, " failed: out of memory?");
}

inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type) {
  try {
    return torch::stable::new_empty(like, sizes, type);
  } catch (const std::exception&) {  // its message is the path of torch's header
    check_torch("new_empty", TORCH_FAILURE);
    throw;
  }
}

// aten::sort of keys [n], stable: the keys in order, and where each of them was.
inline std::array<Tensor, 2> sort_keys(const Tensor& keys) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  const int64_t first_dim = 0;
  std::array<StableIValue, 4> stack{from(keys), from(std::optional<bool>(true)), from(first_dim), from(false)};
  check_torch("aten::sort", torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

}  // namespace ava
