// What the threads know of a row before they have seen a logit, and how the gradient of a row makes room for the next.
#pragma once
#include "softmax_rows_measure.cuh"
#include "softmax_rows_sparse.cuh"

namespace ava {

// In place of a target: behind the last row.
constexpr int32_t kNoRow = -2;

template <class Element>
struct RowHeader {
  RowPart<Element> part;
  unsigned index;
  unsigned number;  // among the rows in these places that count
  int32_t target;   // -1: the row is left out; kNoRow
  float weight;
  // Of this row and of the next, whose vectors take the places of this one's: the vectors of the longer one; and those that
  // move 16 bytes at once in the logits, the gradient and the next row, but for the first if that is an edge of either.
  // Where no row follows that counts none does: the last row may take a little longer.
  Share all, whole;
  int32_t begins_with_edge;

  // By one thread, before the row. last: of the row before it in these places, which learns of this one; null: none.
  __device__ __forceinline__ void announce(const RowArguments& a, unsigned row, int rank, RowHeader* last,
                                           bool is_in_shared) {
    const bool has_last = last && last->target != kNoRow;
    if (row >= unsigned(a.n_rows)) {
      target = kNoRow;
      if (has_last) part = last->part;  // looked at by all, used by nobody
    } else {
      number = last ? last->number + (last->target >= 0) : 0;
      weight = weight_of<float>(a, row);
      part = RowPart<Element>(a, row, rank);
      index = row;
      target = counted_target(a, row);
    }
    if (has_last) last->join(*this, is_in_shared);
  }

  __device__ __forceinline__ void join(const RowHeader& next, bool is_in_shared) {
    const bool has_next = next.target >= 0;
    all = has_next ? larger(part.all, next.part.all) : part.all;
    whole = has_next ? smaller(part.whole, next.part.whole) : part.whole;
    begins_with_edge = part.begins_with_edge() || (has_next && next.part.begins_with_edge());
    if (part.n_whole_in_gradient == 0 || (is_in_shared && !has_next)) whole = {0, 0};
  }
};

template <class Element, Residence kResidence>
__device__ __forceinline__ void fetch_row(const RowArguments& a, const RowHeader<Element>& header,
                                          const Kept<Element, kResidence>& kept) {
  const RowSlice<Element> row(a, header.part);
#pragma unroll 1
  for (int stage = 0; stage < kStages<kResidence>; ++stage) {
    const SlotRange range = slots_of_stage<kResidence>(a, stage);
    for (int i = range.begin; i < range.end; ++i)
      kept.fetch(row, i, row.first + i * int(blockDim.x) + int(threadIdx.x));
    if constexpr (kept.kInShared) cp_async_commit();
  }
}

// Writes the gradient of this row, whose vectors gradient_of(i, vector) makes, and fills their places with the next row.
template <class Element, Residence kResidence, Features kFeatures, class GradientOf>
__device__ __forceinline__ void write_row(const RowArguments& a, const RowHeader<Element>& header,
                                          const RowHeader<Element>& next_header, const Kept<Element, kResidence>& kept,
                                          GradientOf gradient_of) {
  constexpr bool kInShared = Kept<Element, kResidence>::kInShared;
  const int thread = threadIdx.x, n_threads = blockDim.x;
  const bool has_next = next_header.target >= 0;
  const RowSlice<Element> row(a, header.part), next(a, next_header.part);
  const int first = row.first + thread;
  const auto write_slot = [&](int i) {
    if (i < row.all.of(thread)) row.store(first + i * n_threads, gradient_of(i, first + i * n_threads));
    if (has_next && i < next.all.of(thread)) kept.fetch(next, i, next.first + thread + i * n_threads);
  };
  // in slots [begin, end) nothing is asked
  const int begin = thread == 0 ? header.begins_with_edge : 0, end = max(begin, header.whole.of(thread));
  const int last = header.all.of(thread);
#pragma unroll 1
  for (int i = begin > 0 ? 0 : end; i < last; i = i + 1 == begin ? end : i + 1) write_slot(i);  // in the first stage
  auto* const gradient = reinterpret_cast<uint4*>(row.gradient);
  const auto* const source = reinterpret_cast<const uint4*>(next.address(next.first - row.first));
  int from = begin, to = min(end, slots_of_stage<kResidence>(a, 0).end);
#pragma unroll 1
  for (int stage = 0; stage < kStages<kResidence>; ++stage) {
    for_slots<kSlotsAtOnce<Element, kFeatures>>(from, to, [&](int i) {
      const int vector = first + i * n_threads;
      store16(gradient + vector, gradient_of(i, vector));
      if constexpr (kInShared) cp_async16(kept.slots + i * n_threads, source + vector);
    });
    from = to;
    to = end;
    if constexpr (kInShared) cp_async_commit();
  }
}

// The same with the gradient that `scratch` says. careful: some logit of this warp needs the careful exponent.
template <class Element, Residence kResidence, Features kFeatures>
__device__ __forceinline__ void write_gradient(const RowArguments& a, const RowHeader<Element>& header,
                                               const RowHeader<Element>& next, const Kept<Element, kResidence>& kept,
                                               const RowScratch<float>* scratch, LogitScale scale, bool careful) {
  const RowSlice<Element> row(a, header.part);
  const float max = scratch->statistics.max, reference = max == -INFINITY ? 0.f : max;
  const auto write = [&](auto is_careful) {
    const Exponent<Element, kFeatures, decltype(is_careful)::value> exponent(scale, reference);
    const GradientScalars scalars = gradient_scalars(scratch->dense, exponent);
    write_row<Element, kResidence, kFeatures>(a, header, next, kept, [&](int i, int vector) {
      return gradient_vector(kept.get(row, i, vector), scalars, exponent);
    });
  };
  if constexpr (kResidence == Residence::streamed)
    write(std::true_type());
  else
    with_care<Element, kFeatures>(careful || needs_care<kFeatures>(reference, scale), write);
}

}  // namespace ava
