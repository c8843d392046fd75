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

// How many of a block's vectors a thread has, where vector i * n_threads + t of the block is slot i of thread t.
struct Share {
  int each, more;  // every thread has `each`, and the first `more` of them one more

  __device__ __forceinline__ int of(int thread) const { return each + (thread < more); }
  __device__ __forceinline__ bool is_below(const Share& other) const {
    return each < other.each || (each == other.each && more < other.more);
  }
};
__device__ __forceinline__ Share smaller(const Share& a, const Share& b) { return a.is_below(b) ? a : b; }
__device__ __forceinline__ Share larger(const Share& a, const Share& b) { return a.is_below(b) ? b : a; }
__device__ __forceinline__ Share share_of(int n_vectors) {
  const unsigned n = n_vectors > 0 ? unsigned(n_vectors) : 0u;
  return {int(n / blockDim.x), int(n % blockDim.x)};
}

// A block's part of one row. Vector v holds the columns v * kSize - phase + [0, kSize).
template <class Element>
struct RowPart {
  static constexpr int kSize = kVectorSize<Element>;
  const Element* logits;   // column -phase; only columns [0, n_columns) are looked at
  Element* gradient;       // the same of the gradient; null: none
  int phase, first, last;  // vectors [first, last)
  unsigned n_whole,
      n_whole_in_gradient;  // vectors of the row that lie inside [0, vocab_size), and are one vector there
  Share all, whole;  // of [first, last): all vectors, and those before the first that is not whole, but for vector 0

  __device__ __forceinline__ RowPart(const RowArguments& a, unsigned row, int part) {
    logits = static_cast<const Element*>(a.logits) + row_offset(a.logits_layout, row);
    phase = int(reinterpret_cast<uintptr_t>(logits) & 15) / int(sizeof(Element));
    logits -= phase;
    gradient = nullptr;
    if (a.grad_logits) gradient = static_cast<Element*>(a.grad_logits) + row_offset(a.grad_layout, row) - phase;
    const int n_vectors = (phase + a.n_columns + kSize - 1) / kSize;
    const int per_part = (n_vectors + a.cluster_size - 1) / a.cluster_size;
    first = part * per_part < n_vectors ? part * per_part : n_vectors;
    last = first + per_part < n_vectors ? first + per_part : n_vectors;
    const int end_whole = (phase + a.vocab_size) / kSize;
    n_whole = end_whole > first_whole() ? unsigned(end_whole - first_whole()) : 0;
    n_whole_in_gradient = (reinterpret_cast<uintptr_t>(gradient) & 15) == 0 ? n_whole : 0;
    all = share_of(last - first);
    whole = share_of((end_whole < last ? end_whole : last) - first);
  }
  __device__ __forceinline__ int first_whole() const { return phase > 0; }
  __device__ __forceinline__ int column(int vector) const { return vector * kSize - phase; }
  __device__ __forceinline__ bool has_column(int column) const {
    const int vector = (phase + column) / kSize;
    return vector >= first && vector < last;
  }
  __device__ __forceinline__ float logit(int column) const { return to_float(logits[phase + column]); }
  __device__ __forceinline__ bool is_whole(int vector) const { return unsigned(vector - first_whole()) < n_whole; }
  __device__ __forceinline__ const Element* address(int vector) const { return logits + int64_t(vector) * kSize; }
  __device__ __forceinline__ bool begins_with_edge() const { return first < first_whole(); }
  __device__ __forceinline__ void store_column(int column, float value) const {
    gradient[phase + column] = from_float<Element>(value);
  }
};

// The same with what loads and stores it.
template <class Element>
struct RowSlice : RowPart<Element> {
  using Part = RowPart<Element>;
  using Part::gradient, Part::kSize, Part::logits, Part::phase;
  static constexpr int kBits = 8 * int(sizeof(Element));
  const RowArguments& arguments;  // in the constant bank: no registers

  __device__ __forceinline__ RowSlice(const RowArguments& a, const Part& part) : Part(part), arguments(a) {}

  // Element by element through a shift register of 16 bytes: no indexed array, little code.
  __device__ __forceinline__ uint4 load_edge(int vector) const {
    uint64_t low = 0, high = 0;
#pragma unroll 1
    for (int k = kSize - 1; k >= 0; --k) {
      const int c = this->column(vector) + k;
      const Element element = c >= 0 && c < arguments.vocab_size ? logits[phase + c] : from_float<Element>(-INFINITY);
      uint64_t raw = 0;
      memcpy(&raw, static_cast<const void*>(&element), sizeof(Element));
      high = high << kBits | low >> (64 - kBits);
      low = low << kBits | raw;
    }
    return {unsigned(low), unsigned(low >> 32), unsigned(high), unsigned(high >> 32)};
  }
  __device__ __forceinline__ uint4 load(int vector) const {
    return this->is_whole(vector) ? load16(this->address(vector)) : load_edge(vector);
  }
  __device__ __forceinline__ void store_edge(int vector, uint4 bits) const {
    uint64_t low = bits.x | uint64_t(bits.y) << 32, high = bits.z | uint64_t(bits.w) << 32;
#pragma unroll 1
    for (int k = 0; k < kSize; ++k) {
      Element element;
      memcpy(static_cast<void*>(&element), &low, sizeof(Element));
      low = low >> kBits | high << (64 - kBits);
      high >>= kBits;
      const int c = this->column(vector) + k;
      if (c >= 0 && c < arguments.n_columns)
        gradient[phase + c] = c < arguments.vocab_size ? element : from_float<Element>(0.f);
    }
  }
  __device__ __forceinline__ void store(int vector, uint4 bits) const {
    if (unsigned(vector - this->first_whole()) < this->n_whole_in_gradient)
      store16(gradient + int64_t(vector) * kSize, bits);
    else
      store_edge(vector, bits);
  }
};

enum class Residence {
  warp,      // a warp has several rows at once in its shared memory
  shared,    // one block for a row
  clusters,  // several blocks for a row, each with a part of it in its shared memory
  streamed,  // nowhere: read twice
};

// A thread's vectors between the passes. Slot i of thread t holds vector first + i * n_threads + t.
template <class Element, Residence kResidence>
struct Kept {
  static constexpr bool kInShared = kResidence != Residence::streamed;
  uint4* slots;  // in shared memory, this thread's first

  __device__ __forceinline__ uint4 get(const RowSlice<Element>& row, int i, int vector) const {
    if constexpr (kInShared) return slots[i * int(blockDim.x)];
    return row.load(vector);
  }
  __device__ __forceinline__ void fetch(const RowSlice<Element>& row, int i, int vector) const {
    if (!kInShared || vector >= row.last) return;
    if (row.is_whole(vector))
      cp_async16(slots + i * int(blockDim.x), row.address(vector));
    else
      slots[i * int(blockDim.x)] = row.load_edge(vector);
  }
};

// Of a long row the maximum of one half is taken while the other still arrives. More stages would hide a little more of
// that time; but each is a loop to enter, in every pass of every thread.
template <Residence kResidence>
constexpr int kStages = kResidence == Residence::shared || kResidence == Residence::clusters ? 2 : 1;
struct SlotRange {
  int begin, end;
};
template <Residence kResidence>
__device__ __forceinline__ SlotRange slots_of_stage(const RowArguments& a, int stage) {
  if (kStages<kResidence> == 1) return {0, a.n_slots};
  return stage == 0 ? SlotRange{0, a.n_slots_first} : SlotRange{a.n_slots_first, a.n_slots};
}

// Unrolled by hand: what the compiler makes of a loop that it unrolls takes half a dozen instructions more to enter.
template <int kUnrolled, class Body>
__device__ __forceinline__ void for_slots(int begin, int end, Body body) {
  int i = begin;
#pragma unroll 1
  for (const int last = end - kUnrolled; i <= last; i += kUnrolled)
#pragma unroll
    for (int k = 0; k < kUnrolled; ++k) body(i + k);
  if (kUnrolled == 2 && i < end) body(i);
}

}  // namespace ava
