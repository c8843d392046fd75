// One flow of control with a stack of its own, and the switch from one to another, of which the sanitizers are told:
// AddressSanitizer has to know which stack is in use, ThreadSanitizer who touches memory.
#pragma once
#ifndef __x86_64__
#error "the emulator switches stacks in x86-64 assembly"
#endif
#include <pthread.h>
#include <sys/mman.h>

#include <cstddef>
#include <cstdlib>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
// device.cpp itself is not compiled with -fsanitize=thread; the flag says that the program is
#ifdef AVA_EMULATOR_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif

namespace cuda_emulator {

#ifdef AVA_EMULATOR_TSAN
constexpr bool kThreadSanitizer = true;
#else
constexpr bool kThreadSanitizer = false;
#endif

// What happened before release(sync) in one thread has happened for whoever calls acquire(sync) later.
struct Sync {
#ifdef AVA_EMULATOR_TSAN
  void release() { __tsan_release(this); }
  void acquire() { __tsan_acquire(this); }
#else
  void release() {}
  void acquire() {}
#endif
  char address;
};

#ifdef __SANITIZE_ADDRESS__
inline void forbid(const void* memory, size_t bytes) { __asan_poison_memory_region(memory, bytes); }
inline void allow(const void* memory, size_t bytes) { __asan_unpoison_memory_region(memory, bytes); }
#else
inline void forbid(const void*, size_t) {}
inline void allow(const void*, size_t) {}
#endif

class Fiber {
 public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  ~Fiber() {
    if (owned_stack_) munmap(owned_stack_, kStackBytes);
#ifdef AVA_EMULATOR_TSAN
    if (owned_stack_ && tsan_fiber_) __tsan_destroy_fiber(tsan_fiber_);
#endif
  }

  // The flow of control that calls this.
  void become_current() {
#ifdef __SANITIZE_ADDRESS__
    pthread_attr_t attributes;
    void* bottom = nullptr;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &bottom, &stack_bytes_);
    pthread_attr_destroy(&attributes);
    stack_bottom_ = bottom;
#endif
#ifdef AVA_EMULATOR_TSAN
    tsan_fiber_ = __tsan_get_current_fiber();
#endif
  }

  // A new one, which begins at `entry`, and must never return from it. `index` spreads the stacks over the cache.
  void begin_at(void (*entry)(), unsigned index) {
    if (!owned_stack_) {
      owned_stack_ =
          mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (owned_stack_ == MAP_FAILED) std::abort();
      stack_bottom_ = owned_stack_;
      stack_bytes_ = kStackBytes;
    }
    allow(owned_stack_, kStackBytes);  // a launch that failed left frames there
    fake_stack_ = nullptr;
#ifdef AVA_EMULATOR_TSAN
    if (!tsan_fiber_) tsan_fiber_ = __tsan_create_fiber(0);
#endif
    char* const top = static_cast<char*>(owned_stack_) + kStackBytes - index % 64 * 192;
    void** const return_address = reinterpret_cast<void**>(top) - 2;  // so that `entry` finds the alignment of a call
    *return_address = reinterpret_cast<void*>(entry);
    stack_pointer_ = return_address - kSavedRegisters;
  }

  // First thing that a new fiber does.
  static void arrived() {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  }

  static void switch_between(Fiber& from, Fiber& to, bool from_ends = false) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(from_ends ? nullptr : &from.fake_stack_, to.stack_bottom_, to.stack_bytes_);
#endif
#ifdef AVA_EMULATOR_TSAN
    __tsan_switch_to_fiber(to.tsan_fiber_, 1);  // 1: a switch orders no memory
#endif
    (void)from_ends;
    swap_stacks(&from.stack_pointer_, to.stack_pointer_);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(from.fake_stack_, nullptr, nullptr);
#endif
  }

 private:
  static constexpr size_t kStackBytes = 256 * 1024;
  static constexpr int kSavedRegisters = 6;  // what a function has to keep for its caller

  __attribute__((naked, noinline)) static void swap_stacks([[maybe_unused]] void** save,   // rdi
                                                           [[maybe_unused]] void* next) {  // rsi
    __asm__(
        "pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15;"
        "movq %rsp, (%rdi); movq %rsi, %rsp;"
        "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret");
  }

  void* owned_stack_ = nullptr;
  void* stack_pointer_ = nullptr;
  const void* stack_bottom_ = nullptr;
  size_t stack_bytes_ = 0;
  void* fake_stack_ = nullptr;
  void* tsan_fiber_ = nullptr;
};

}  // namespace cuda_emulator
