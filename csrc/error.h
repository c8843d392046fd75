// Errors as Python sees them: AVA_CHECK(condition, parts...) raises RuntimeError with the parts as message, which
// begins with the operator's name. Torch's own STD_TORCH_CHECK puts the build machine's path of the source before it.
#pragma once
#include <sstream>
#include <stdexcept>

namespace ava {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}
// An index that is out of range: IndexError, as in torch.
template <class... Parts>
[[noreturn]] void fail_index(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::out_of_range(message.str());
}

// What torch says, and training loops look for.
[[noreturn]] inline void fail_out_of_memory(const char* how_much) {
  fail("DefaultCPUAllocator: can't allocate memory: you tried to allocate ", how_much,
       ". Error code 12 (Cannot allocate memory)");
}

}  // namespace ava

#define AVA_CHECK(condition, ...)  \
  do {                             \
    if (!(condition)) [[unlikely]] \
      ::ava::fail(__VA_ARGS__);    \
  } while (false)
