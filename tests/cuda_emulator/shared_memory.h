// The shared memory of one block: the dynamic bytes, then the arrays of AVA_SHARED as they are first reached.
//
//   | red zone | dynamic | red zone | array | red zone | array | red zone | ...
//
// Everything starts as nan. A write into a red zone is found when the block ends, under AddressSanitizer at once.
#pragma once
#include <cstring>
#include <memory>
#include <vector>

#include "fiber.h"

namespace cuda_emulator {

#ifdef __SANITIZE_ADDRESS__
constexpr bool kRedZonesAreForbidden = true;
#else
constexpr bool kRedZonesAreForbidden = false;
#endif

class SharedMemory {
 public:
  explicit SharedMemory(size_t dynamic_bytes)
      : dynamic_bytes_(dynamic_bytes),
        bytes_(kRedZone + rounded(dynamic_bytes) + kRedZone + kMostArrays * kRedZone + kMostArrayBytes),
        memory_(static_cast<unsigned char*>(std::aligned_alloc(128, (bytes_ + 127) / 128 * 128))) {
    if (!memory_) std::abort();
    std::memset(memory_, kUnset, bytes_);
    fill_red_zone(0);
    forbid(memory_, bytes_);
    allow(dynamic(), dynamic_bytes);
    used_ = kRedZone + rounded(dynamic_bytes);
    fill_red_zone(used_);
    used_ += kRedZone;
  }
  SharedMemory(const SharedMemory&) = delete;
  ~SharedMemory() {
    allow(memory_, bytes_);
    std::free(memory_);
  }

  unsigned char* dynamic() const { return memory_ + kRedZone; }
  bool has_dynamic(const void* pointer) const { return pointer >= dynamic() && pointer < dynamic() + dynamic_bytes_; }

  // The array of this statement; null where there are too many. Runs on a thread's fiber: nothing here may call libc,
  // whose functions ThreadSanitizer watches, or it would see a race between the threads that reach the statement.
  void* array(const void* statement, size_t bytes) {
    for (int i = 0; i < n_arrays_; ++i)
      if (arrays_[i].statement == statement) return arrays_[i].memory;
    array_bytes_ += rounded(bytes);
    if (n_arrays_ == kMostArrays || array_bytes_ > kMostArrayBytes) return nullptr;
    unsigned char* const memory = memory_ + used_;
    allow(memory, bytes);
    used_ += rounded(bytes);
    fill_red_zone(used_);
    used_ += kRedZone;
    arrays_[n_arrays_++] = {statement, memory, bytes};
    return memory;
  }

  // whether nobody wrote outside the arrays
  bool red_zones_intact() const {
    if (kRedZonesAreForbidden) return true;
    bool intact = is_intact(0) && is_intact(kRedZone + rounded(dynamic_bytes_)) &&
                  is_unset(dynamic() + dynamic_bytes_, rounded(dynamic_bytes_) - dynamic_bytes_);
    for (int i = 0; i < n_arrays_; ++i) {
      const size_t padding = rounded(arrays_[i].bytes) - arrays_[i].bytes;
      const unsigned char* const end = arrays_[i].memory + arrays_[i].bytes;
      intact = intact && is_unset(end, padding) && is_intact(end + padding - memory_);
    }
    return intact;
  }

  // when the block has ended: nan for whoever still looks
  void end() {
    forbid(memory_, bytes_);
    if (!kRedZonesAreForbidden && !kThreadSanitizer)  // to whom it would be a race with the block's last threads
      std::memset(memory_, kUnset, bytes_);
  }

 private:
  static constexpr size_t kRedZone = 64;
  static constexpr int kMostArrays = 64;
  static constexpr size_t kMostArrayBytes = 48 * 1024;
  static constexpr unsigned char kUnset = 0xff, kMark = 0xcd;
  struct Array {
    const void* statement;
    unsigned char* memory;
    size_t bytes;
  };

  static size_t rounded(size_t bytes) { return (bytes + 15) / 16 * 16; }
  void fill_red_zone(size_t offset) {
    if (kRedZonesAreForbidden) return;
    volatile unsigned char* const zone = memory_ + offset;  // volatile: or the compiler makes it a memset
    for (size_t i = 0; i < kRedZone; ++i) zone[i] = kMark;
  }
  static bool is_filled(const unsigned char* memory, size_t bytes, unsigned char value) {
    for (size_t i = 0; i < bytes; ++i)
      if (memory[i] != value) return false;
    return true;
  }
  bool is_intact(size_t red_zone) const { return is_filled(memory_ + red_zone, kRedZone, kMark); }
  static bool is_unset(const unsigned char* memory, size_t bytes) { return is_filled(memory, bytes, kUnset); }

  size_t dynamic_bytes_, bytes_, used_ = 0, array_bytes_ = 0;
  unsigned char* memory_;
  Array arrays_[kMostArrays];
  int n_arrays_ = 0;
};

}  // namespace cuda_emulator
