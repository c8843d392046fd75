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
inline float log2_fast(float x) { return std::log2(x); }
inline float reciprocal_fast(float x) { return 1 / x; }
inline float max_keep_nan(float x, float y) { return x != x ? x : y != y ? y : x > y ? x : y; }
inline float min_keep_nan(float x, float y) { return x != x ? x : y != y ? y : x < y ? x : y; }

inline uint32_t bit_at(unsigned shift) { return shift < 32 ? 1u << shift : 0; }
inline unsigned computed_again(unsigned value) { return value; }
template <class Type>
Type computed_once(Type value) {
  return value;
}
template <class Type>
Type* shared_computed_once(Type* shared) {
  return shared;
}

template <class Element>
void add_tile(uint4 vector, TileSums& sums, Place place = Place::current()) {
  Element elements[8];
  memcpy(static_cast<void*>(elements), &vector, sizeof(vector));
  // words x and z are of the row of a lane's group, y and w of the eighth row below
  float of_rows[2] = {};
  for (int k = 0; k < 8; ++k) of_rows[k / 2 % 2] += ava::widen(elements[k].number);
  for (int row = 0; row < 2; ++row) {
    for (int other = 1; other < 4; other *= 2) of_rows[row] += __shfl_xor_sync(~0u, of_rows[row], other, place);
    sums.of_rows[2 * row] += of_rows[row];
    sums.of_rows[2 * row + 1] += of_rows[row];
  }
}

inline bool is_aligned16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }
inline uint4 load16(const void* global, Place place = Place::current()) {
  cuda_emulator::require(is_aligned16(global), "load16: expected an address aligned to 16 bytes", place);
  return *static_cast<const uint4*>(global);
}
inline void store16(void* global, uint4 value, Place place = Place::current()) {
  cuda_emulator::require(is_aligned16(global), "store16: expected an address aligned to 16 bytes", place);
  *static_cast<uint4*>(global) = value;
}

template <class Element>
void store_in_vector(Element* place, Element value) {
  memcpy(static_cast<void*>(place), static_cast<const void*>(&value), sizeof(Element));
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

// The eight bytes themselves are written once, so that ThreadSanitizer sees a use that nothing orders behind it.
inline void mbarrier_init(uint64_t* mbarrier, int n_arrivals, Place place = Place::current()) {
  *mbarrier = 0;
  cuda_emulator::init_mbarrier(mbarrier, n_arrivals, place);
}
inline void mbarrier_arrive_expecting(uint64_t* mbarrier, int n_bytes, Place place = Place::current()) {
  static_cast<void>(*static_cast<const volatile uint64_t*>(mbarrier));
  cuda_emulator::arrive_at_mbarrier(mbarrier, n_bytes, place);
}
inline void mbarrier_wait(uint64_t* mbarrier, unsigned parity, Place place = Place::current()) {
  static_cast<void>(*static_cast<const volatile uint64_t*>(mbarrier));
  cuda_emulator::wait_at_mbarrier(mbarrier, parity, place);
}
inline void store_async16(void* shared, uint4 value, uint64_t* mbarrier, int rank, Place place = Place::current()) {
  cuda_emulator::require(is_aligned16(shared), "store_async16: expected a place aligned to 16 bytes", place);
  void* const there = cuda_emulator::map_shared(shared, unsigned(rank), place);
  void* const counter = cuda_emulator::map_shared(mbarrier, unsigned(rank), place);
  static_cast<void>(*static_cast<const volatile uint64_t*>(counter));
  *static_cast<uint4*>(there) = {~0u, ~0u, ~0u, ~0u};  // until the bytes arrive
  cuda_emulator::store_async(there, value, counter, unsigned(rank), place);
}

}  // namespace ava
