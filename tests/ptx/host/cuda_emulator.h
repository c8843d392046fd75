// What csrc/cuda/dialect.cuh and launch.h include here in place of the emulated device: the host code of the operators
// runs as it is, and each launch goes to Python, which runs the PTX of that kernel (tests/ptx/cuda_operators.py). The
// text of the kernels is compiled by g++ as well, for their addresses alone.
#pragma once
#define launch launch_on_emulated_device
#include "../../cuda_emulator/cuda_emulator.h"
#undef launch

#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace ptx_host {

// Runs a kernel. Returns 0, or else Python has kept an exception.
using RunKernel = int (*)(const void* kernel, const unsigned* grid, const unsigned* block, size_t shared_bytes,
                          unsigned cluster_size, const unsigned char* parameters, size_t n_bytes);
extern RunKernel run_kernel;

// Parameters lie one behind the other, each at a multiple of its alignment, as in the PTX of a kernel.
template <class Parameter>
void append(std::vector<unsigned char>& bytes, const Parameter& parameter) {
  const size_t first = (bytes.size() + alignof(Parameter) - 1) / alignof(Parameter) * alignof(Parameter);
  bytes.resize(first + sizeof(Parameter));
  std::memcpy(bytes.data() + first, &parameter, sizeof(Parameter));
}

}  // namespace ptx_host

namespace ava {

template <class... Parameters, class... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), const LaunchShape& shape, Stream, Arguments&&... arguments) {
  std::vector<unsigned char> bytes;
  (ptx_host::append<Parameters>(bytes, static_cast<Parameters>(arguments)), ...);
  const unsigned grid[] = {shape.grid.x, shape.grid.y, shape.grid.z};
  const unsigned block[] = {shape.block.x, shape.block.y, shape.block.z};
  if (ptx_host::run_kernel(reinterpret_cast<const void*>(kernel), grid, block, shape.shared_bytes, shape.cluster_size,
                           bytes.data(), bytes.size()))
    throw std::runtime_error(std::string(op) + ": the kernel failed");
}

}  // namespace ava
