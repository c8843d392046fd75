// The schemas of all operators: the table of contents of this library.
#include <string>

#include "cpu/capability.h"
#include "torch_stable.h"

static std::string cpu_capability() { return ava::name(ava::cpu_capability()); }

STABLE_TORCH_LIBRARY(ava_ext, m) {
  // which instruction set the CPU kernels use
  m.def("cpu_capability() -> str");
}
STABLE_TORCH_LIBRARY_IMPL(ava_ext, CompositeExplicitAutograd, m) { m.impl("cpu_capability", TORCH_BOX(&cpu_capability)); }
