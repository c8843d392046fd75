// CUDA's built-in functions: barriers, shuffles, votes, atomics, fast-math and bits.
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
// the lanes of a warp form groups of `width`, each a small warp
inline int group_start(int width) { return lane() & ~(width - 1); }

}  // namespace cuda_emulator

template <class Value>
Value __shfl_sync(uint32_t mask, Value value, int source, int width = 32,
                  cuda_emulator::Place place = cuda_emulator::Place::current()) {
  const int from = cuda_emulator::group_start(width) + (source & (width - 1));
  return cuda_emulator::shuffle(cuda_emulator::WarpOperation::shuffle, mask, value, from, place);
}
template <class Value>
Value __shfl_xor_sync(uint32_t mask, Value value, int lane_mask, int width = 32,
                      cuda_emulator::Place place = cuda_emulator::Place::current()) {
  const int lane = cuda_emulator::lane(), partner = lane ^ lane_mask;
  const int from = partner < cuda_emulator::group_start(width) + width ? partner : lane;
  return cuda_emulator::shuffle(cuda_emulator::WarpOperation::shuffle_xor, mask, value, from, place);
}
template <class Value>
Value __shfl_up_sync(uint32_t mask, Value value, int delta, int width = 32,
                     cuda_emulator::Place place = cuda_emulator::Place::current()) {
  const int lane = cuda_emulator::lane(), from = lane - delta;
  return cuda_emulator::shuffle(cuda_emulator::WarpOperation::shuffle_up, mask, value,
                                from < cuda_emulator::group_start(width) ? lane : from, place);
}
template <class Value>
Value __shfl_down_sync(uint32_t mask, Value value, int delta, int width = 32,
                       cuda_emulator::Place place = cuda_emulator::Place::current()) {
  const int lane = cuda_emulator::lane(), from = lane + delta;
  return cuda_emulator::shuffle(cuda_emulator::WarpOperation::shuffle_down, mask, value,
                                from < cuda_emulator::group_start(width) + width ? from : lane, place);
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

// Atomics order all memory, so that ThreadSanitizer accepts what a __threadfence() beside them would make right.
inline void __threadfence() {}
inline void __threadfence_block() {}
template <class Value>
using Same = std::type_identity_t<Value>;
namespace cuda_emulator {
template <class Value, class Change>
Value read_modify_write(Value* place, Change change) {
  Value before, after;
  __atomic_load(place, &before, __ATOMIC_ACQUIRE);
  do {
    after = change(before);
  } while (!__atomic_compare_exchange(place, &before, &after, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE));
  return before;
}
}  // namespace cuda_emulator
template <class Value>
Value atomicAdd(Value* place, Same<Value> value) {
  return cuda_emulator::read_modify_write(place, [=](Value old) { return Value(old + value); });
}
template <class Value>
Value atomicMax(Value* place, Same<Value> value) {
  return cuda_emulator::read_modify_write(place, [=](Value old) { return old > value ? old : value; });
}
template <class Value>
Value atomicMin(Value* place, Same<Value> value) {
  return cuda_emulator::read_modify_write(place, [=](Value old) { return old < value ? old : value; });
}
template <class Value>
Value atomicOr(Value* place, Same<Value> value) {
  return cuda_emulator::read_modify_write(place, [=](Value old) { return Value(old | value); });
}
template <class Value>
Value atomicExch(Value* place, Same<Value> value) {
  return cuda_emulator::read_modify_write(place, [=](Value) { return value; });
}
template <class Value>
Value atomicCAS(Value* place, Same<Value> expected, Same<Value> value) {
  return cuda_emulator::read_modify_write(place, [=](Value old) { return old == expected ? value : old; });
}

template <class Value>
Value __ldg(const Value* global) {
  return *global;
}
template <class Value>
Value __ldcs(const Value* global) {
  return *global;
}
template <class Value>
void __stcs(Value* global, Same<Value> value) {
  *global = value;
}
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
// Four of the eight bytes, of x from 0 on, of y from 4 on.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = uint64_t(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= unsigned(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return result;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline unsigned __brev(unsigned bits) {
  unsigned result = 0;
  for (int i = 0; i < 32; ++i) result |= (bits >> i & 1) << (31 - i);
  return result;
}
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits ? __builtin_clz(unsigned(bits)) : 32; }
inline unsigned __float_as_uint(float value) { return ava::float_to_bits(value); }
inline int __float_as_int(float value) { return int(ava::float_to_bits(value)); }
inline float __int_as_float(int bits) { return ava::bits_to_float(unsigned(bits)); }
inline float __uint_as_float(unsigned bits) { return ava::bits_to_float(bits); }
