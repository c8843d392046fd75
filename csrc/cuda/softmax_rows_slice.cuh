// How a row is cut among blocks and threads, and where a thread keeps its share.
//
// A row is cut into 16-byte vectors at the 16-byte boundaries of *memory*: any stride and alignment loads whole
// vectors. The vectors at the row's two ends, and the one where the padding begins, go element by element; what is no
// logit there becomes -inf. A vector has one owner thread, which loads it, keeps it, sums over it and overwrites it: no
// other thread touches it, so the row's data need no barrier at all.
#pragma once
#include "primitives.cuh"
#include "softmax_rows_arguments.h"

namespace ava {

// A block's part of one row. Vector v holds the columns v * kSize - phase + [0, kSize).
template <class Element>
struct RowSlice {
  static constexpr int kSize = kVectorSize<Element>, kBits = 8 * int(sizeof(Element));
  const RowArguments& arguments;  // in the constant bank: no registers
  const Element* aligned;         // column -phase; only columns [0, n_columns) are looked at
  int phase, first, last;         // vectors [first, last)
  unsigned n_whole;               // vectors that lie inside [0, vocab_size)

  __device__ __forceinline__ RowSlice(const RowArguments& a, int64_t row, int part) : arguments(a) {
    const Element* const logits = static_cast<const Element*>(a.logits) + row_offset(a.logits_layout, uint32_t(row));
    phase = int(reinterpret_cast<uintptr_t>(logits) & 15) / int(sizeof(Element));
    aligned = logits - phase;
    const int n_vectors = (phase + a.n_columns + kSize - 1) / kSize;
    const int per_part = (n_vectors + a.cluster_size - 1) / a.cluster_size;
    first = part * per_part < n_vectors ? part * per_part : n_vectors;
    last = first + per_part < n_vectors ? first + per_part : n_vectors;
    const int end_whole = (phase + a.vocab_size) / kSize;
    n_whole = end_whole > first_whole() ? unsigned(end_whole - first_whole()) : 0;
  }
  __device__ __forceinline__ int first_whole() const { return phase > 0; }
  __device__ __forceinline__ int column(int vector) const { return vector * kSize - phase; }
  __device__ __forceinline__ bool has_column(int column) const {
    const int vector = (phase + column) / kSize;
    return vector >= first && vector < last;
  }
  __device__ __forceinline__ float logit(int column) const { return to_float(aligned[phase + column]); }
  __device__ __forceinline__ bool is_whole(int vector) const { return unsigned(vector - first_whole()) < n_whole; }
  __device__ __forceinline__ const Element* address(int vector) const { return aligned + int64_t(vector) * kSize; }

  // Element by element through a shift register of 16 bytes: no indexed array, little code.
  __device__ __forceinline__ uint4 load_edge(int vector) const {
    uint64_t low = 0, high = 0;
#pragma unroll 1
    for (int k = kSize - 1; k >= 0; --k) {
      const int c = column(vector) + k;
      const Element element = c >= 0 && c < arguments.vocab_size ? aligned[phase + c] : from_float<Element>(-INFINITY);
      uint64_t raw = 0;
      memcpy(&raw, static_cast<const void*>(&element), sizeof(Element));
      high = high << kBits | low >> (64 - kBits);
      low = low << kBits | raw;
    }
    return {unsigned(low), unsigned(low >> 32), unsigned(high), unsigned(high >> 32)};
  }
  __device__ __forceinline__ uint4 load(int vector) const {
    return is_whole(vector) ? load16(address(vector)) : load_edge(vector);
  }
  __device__ __forceinline__ void store_edge(Element* gradient, int vector, uint4 bits) const {
    uint64_t low = bits.x | uint64_t(bits.y) << 32, high = bits.z | uint64_t(bits.w) << 32;
#pragma unroll 1
    for (int k = 0; k < kSize; ++k) {
      Element element;
      memcpy(static_cast<void*>(&element), &low, sizeof(Element));
      low = low >> kBits | high << (64 - kBits);
      high >>= kBits;
      const int c = column(vector) + k;
      if (c >= 0 && c < arguments.n_columns)
        gradient[phase + c] = c < arguments.vocab_size ? element : from_float<Element>(0.f);
    }
  }
};

// The row of the gradient that belongs to a slice.
template <class Element>
struct GradientSlice {
  const RowSlice<Element>& row;
  Element* aligned;  // column -phase of the *logits*
  unsigned n_whole;

  __device__ __forceinline__ GradientSlice(const RowArguments& a, const RowSlice<Element>& row, int64_t row_index)
      : row(row) {
    aligned = static_cast<Element*>(a.grad_logits) + row_offset(a.grad_layout, uint32_t(row_index)) - row.phase;
    n_whole = (reinterpret_cast<uintptr_t>(aligned) & 15) == 0 ? row.n_whole : 0;  // else cut at other boundaries
  }
  __device__ __forceinline__ void store(int vector, uint4 bits) const {
    if (unsigned(vector - row.first_whole()) < n_whole)
      store16(aligned + int64_t(vector) * RowSlice<Element>::kSize, bits);
    else
      row.store_edge(aligned, vector, bits);
  }
  __device__ __forceinline__ void store_column(int column, float value) const {
    aligned[row.phase + column] = from_float<Element>(value);
  }
};

enum class Residence {
  registers,
  shared,    // one block for a row
  clusters,  // several blocks for a row, each with a part of it in its shared memory
  streamed,  // nowhere: read twice
};

constexpr int kRegisterVectors = 2;  // that a thread keeps in registers

// A thread's vectors between the passes. Slot i of thread t holds vector first + i * n_threads + t.
template <class Element, Residence kResidence>
struct Kept {
  static constexpr bool kStaged = kResidence == Residence::shared || kResidence == Residence::clusters;
  uint4 registers[kResidence == Residence::registers ? kRegisterVectors : 1];
  uint4* slots;  // in shared memory, this thread's first

  __device__ __forceinline__ uint4 get(const RowSlice<Element>& row, int i, int vector) const {
    if constexpr (kResidence == Residence::registers) return registers[i];
    if constexpr (kStaged) return slots[i * int(blockDim.x)];
    return row.load(vector);
  }
  __device__ __forceinline__ void fetch(const RowSlice<Element>& row, int i, int vector) {
    if (kResidence == Residence::streamed || vector >= row.last) return;
    if constexpr (kResidence == Residence::registers)
      registers[i] = row.load(vector);
    else if (row.is_whole(vector))
      cp_async16(slots + i * int(blockDim.x), row.address(vector));
    else
      slots[i * int(blockDim.x)] = row.load_edge(vector);
  }
};

// Register arrays need indices known at compile time; shared memory a rolled loop.
template <Residence kResidence, int kUnrolled, class Body>
__device__ __forceinline__ void for_slots(int begin, int end, Body body) {
  if constexpr (kResidence == Residence::registers) {
#pragma unroll
    for (int i = 0; i < kRegisterVectors; ++i) body(i);
  } else {
#pragma unroll kUnrolled
    for (int i = begin; i < end; ++i) body(i);
  }
}

}  // namespace ava
