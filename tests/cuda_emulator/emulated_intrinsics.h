// CUDA's built-in functions, as far as kernels use them: barriers, shuffles, votes and bits.
#pragma once
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "device.h"

using std::max;
using std::min;

inline void __syncthreads(cuda_emulator::Place place = cuda_emulator::Place::current()) {
  cuda_emulator::block_barrier(place);
}

namespace cuda_emulator {

constexpr uint32_t kWholeWarp = 0xffffffffu;

template <class Value>
uint64_t to_bits(Value value) {
  static_assert(std::is_trivially_copyable_v<Value> && sizeof(Value) <= 8);
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof(Value));
  return bits;
}
template <class Value>
Value from_bits(uint64_t bits) {
  Value value;
  __builtin_memcpy(&value, &bits, sizeof(Value));
  return value;
}
template <class Value>
Value shuffle(WarpOperation operation, uint32_t mask, Value value, int source, Place place) {
  return from_bits<Value>(warp_operation(operation, mask, to_bits(value), source, place));
}
inline int lane() { return int(current->lane); }

}  // namespace cuda_emulator

template <class Value>
Value __shfl_sync(uint32_t mask, Value value, int source,
                  cuda_emulator::Place place = cuda_emulator::Place::current()) {
  return cuda_emulator::shuffle(cuda_emulator::WarpOperation::shuffle, mask, value, source & 31, place);
}
template <class Value>
Value __shfl_xor_sync(uint32_t mask, Value value, int lane_mask,
                      cuda_emulator::Place place = cuda_emulator::Place::current()) {
  const int from = cuda_emulator::lane() ^ lane_mask;
  return cuda_emulator::shuffle(cuda_emulator::WarpOperation::shuffle_xor, mask, value, from, place);
}
template <class Value>
Value __shfl_up_sync(uint32_t mask, Value value, int delta,
                     cuda_emulator::Place place = cuda_emulator::Place::current()) {
  const int lane = cuda_emulator::lane(), from = lane < delta ? lane : lane - delta;
  return cuda_emulator::shuffle(cuda_emulator::WarpOperation::shuffle_up, mask, value, from, place);
}
template <class Value>
Value __shfl_down_sync(uint32_t mask, Value value, int delta,
                       cuda_emulator::Place place = cuda_emulator::Place::current()) {
  const int lane = cuda_emulator::lane(), from = lane + delta < 32 ? lane + delta : lane;
  return cuda_emulator::shuffle(cuda_emulator::WarpOperation::shuffle_down, mask, value, from, place);
}
inline uint32_t __ballot_sync(uint32_t mask, bool vote, cuda_emulator::Place place = cuda_emulator::Place::current()) {
  return uint32_t(cuda_emulator::warp_operation(cuda_emulator::WarpOperation::ballot, mask, vote, 0, place));
}
inline bool __any_sync(uint32_t mask, bool vote, cuda_emulator::Place place = cuda_emulator::Place::current()) {
  return __ballot_sync(mask, vote, place) != 0;
}
inline bool __all_sync(uint32_t mask, bool vote, cuda_emulator::Place place = cuda_emulator::Place::current()) {
  return __ballot_sync(mask, !vote, place) == 0;
}
inline void __syncwarp(uint32_t mask = cuda_emulator::kWholeWarp,
                       cuda_emulator::Place place = cuda_emulator::Place::current()) {
  cuda_emulator::warp_operation(cuda_emulator::WarpOperation::sync, mask, 0, 0, place);
}

// Reductions over a whole warp.
namespace cuda_emulator {
template <class Pick>
int reduce(uint32_t mask, int value, Pick pick, Place place) {
  require(mask == kWholeWarp, "__reduce_*_sync: expected a whole warp", place);
  for (int offset = 16; offset > 0; offset /= 2)
    value = pick(value, shuffle(WarpOperation::shuffle_xor, mask, value, lane() ^ offset, place));
  return value;
}
}  // namespace cuda_emulator
inline int __reduce_min_sync(uint32_t mask, int value, cuda_emulator::Place place = cuda_emulator::Place::current()) {
  return cuda_emulator::reduce(mask, value, [](int a, int b) { return a < b ? a : b; }, place);
}
inline int __reduce_add_sync(uint32_t mask, int value, cuda_emulator::Place place = cuda_emulator::Place::current()) {
  return cuda_emulator::reduce(mask, value, [](int a, int b) { return a + b; }, place);
}
inline int __reduce_max_sync(uint32_t mask, int value, cuda_emulator::Place place = cuda_emulator::Place::current()) {
  return cuda_emulator::reduce(mask, value, [](int a, int b) { return a > b ? a : b; }, place);
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline unsigned __brev(unsigned bits) {
  unsigned result = 0;
  for (int i = 0; i < 32; ++i) result |= (bits >> i & 1) << (31 - i);
  return result;
}
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(unsigned(bits)); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline unsigned __float_as_uint(float value) { return ava::float_to_bits(value); }
inline int __float_as_int(float value) { return int(ava::float_to_bits(value)); }
inline float __int_as_float(int bits) { return ava::bits_to_float(unsigned(bits)); }
inline float __uint_as_float(unsigned bits) { return ava::bits_to_float(bits); }
