// The emulated csrc/cuda/primitives.cuh, whose comments say what each does.
#pragma once
#include <cmath>

#include "cuda_emulator.h"

namespace ava {

using cuda_emulator::Place;

inline float exp2_fast(float x) {
  const float result = std::exp2(x);
  return result < 1.17549435e-38f ? 0.0f : result;
}
inline float reciprocal_fast(float x) { return 1 / x; }
inline float max_keep_nan(float x, float y) { return x != x ? x : y != y ? y : x > y ? x : y; }

inline uint32_t bit_at(unsigned shift) { return shift < 32 ? 1u << shift : 0; }
inline unsigned computed_again(unsigned value) { return value; }

inline bool is_aligned16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }
inline uint4 load16(const void* global, Place place = Place::current()) {
  cuda_emulator::require(is_aligned16(global), "load16: expected an address aligned to 16 bytes", place);
  return *static_cast<const uint4*>(global);
}
inline void store16(void* global, uint4 value, Place place = Place::current()) {
  cuda_emulator::require(is_aligned16(global), "store16: expected an address aligned to 16 bytes", place);
  *static_cast<uint4*>(global) = value;
}

inline void cp_async16(void* shared, const void* global, Place place = Place::current()) {
  cuda_emulator::require(is_aligned16(shared) && is_aligned16(global),
                         "cp_async16: expected addresses aligned to 16 bytes", place);
  cuda_emulator::copy_async(shared, global, 16, place);
}
inline void cp_async_commit() { cuda_emulator::commit_copies(); }
template <int kPending>
inline void cp_async_wait() {
  cuda_emulator::wait_for_copies(kPending);
}

inline unsigned cluster_rank() { return cuda_emulator::current->cluster_rank; }
inline void cluster_sync(Place place = Place::current()) { cuda_emulator::cluster_barrier(place); }
template <class Type>
inline Type* cluster_map(Type* shared, unsigned rank, Place place = Place::current()) {
  return static_cast<Type*>(cuda_emulator::map_shared(shared, rank, place));
}

}  // namespace ava
