// Memory for large gradients that outlives them. A fresh gradient costs more in page faults than in arithmetic (a row
// kernel at [1024, 50257] float32: 15 ms into warm memory, 25 to 80 ms into fresh); the next step wants the same size
// again.
#pragma once
#include "../gradient_layout.h"

namespace ava {

// An uninitialised CPU tensor of the logits' type. Its memory goes back to the pool when the last reference to its
// storage dies, whoever holds it. Below 1 MiB, and on a torch without torch_from_blob (2.10), torch allocates as usual.
//
// The pool keeps at most two idle blocks, and none that kIdleRequests gradients in a row have had no use for: sizes
// that are gone for good leave nothing behind. Where memory is short they go at once.
Tensor pooled_empty(const TensorLayout& layout, const Tensor& logits);

constexpr int64_t kIdleRequests = 32;

// Frees the idle blocks; returns their bytes.
int64_t free_idle_blocks();

}  // namespace ava
