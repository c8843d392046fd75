// AVA_BOX(&function): what a library registers as an operator. As TORCH_BOX, but out of memory is the RuntimeError that
// it is in torch, not a MemoryError.
#pragma once
#include <new>

#include "error.h"
#include "torch_stable.h"

namespace ava {

template <void (*boxed)(StableIValue*, uint64_t, uint64_t)>
void with_torch_errors(StableIValue* stack, uint64_t n_arguments, uint64_t n_outputs) {
  try {
    boxed(stack, n_arguments, n_outputs);
  } catch (const std::bad_alloc&) {
    fail_out_of_memory("an operator's own working memory");
  }
}

}  // namespace ava

#define AVA_BOX(function) ::ava::with_torch_errors<TORCH_BOX(function)>
