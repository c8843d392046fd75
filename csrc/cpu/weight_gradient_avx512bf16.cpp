// The kernels of weight_gradient.h, which explains them.
#include "capability.h"
#ifdef AVA_X86
AVA_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns of its own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#define AVA_ISA avx512bf16
#include <immintrin.h>

#include "weight_gradient.h"

namespace ava {
inline namespace AVA_ISA {

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// the first n of 16 lanes
static __mmask16 first_lanes(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : __mmask16((1 << n) - 1); }

// Up to 16 elements of the rows `row` and, if there is one, `row + 1`; zeros elsewhere.
static void pack_pair(const BFloat16* elements,  // [n_rows, lanes]
                      int64_t stride, int64_t row, int64_t n_rows, __mmask16 lanes, PackedPairs* out) {
  const BFloat16* even = elements + row * stride;
  const bool has_odd = row + 1 < n_rows;
  const __m256i low = _mm256_maskz_loadu_epi16(lanes, even),
                high = _mm256_maskz_loadu_epi16(has_odd ? lanes : 0, has_odd ? even + stride : even);
  _mm512_store_si512(out,
                     _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16)));
}

static void pack_states(const WeightGradientArguments& arguments, int64_t tile_begin, int64_t tile_end,
                        PackedPairs* packed_states) {
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    PackedPairs* out = packed_states + tile * n_pairs_of(arguments) * 2;
    const int64_t begin = tile * kTileHidden, n = arguments.hidden_size - begin;
    for (int64_t row = 0; row < arguments.n_rows; row += 2)
      for (int64_t half = 0; half < 2; ++half) {
        const BFloat16* elements = arguments.hidden_states + begin + 16 * half;
        pack_pair(elements, arguments.hidden_states_stride, row, arguments.n_rows, first_lanes(n - 16 * half), out++);
      }
  }
}

// row by row, in the order of the memory they come from
static void pack_gradient(const WeightGradientArguments& arguments, int64_t tile_begin, int64_t tile_end,
                          PackedPairs* packed_gradient) {
  const int64_t n_pairs = n_pairs_of(arguments);
  for (int64_t pair = 0; pair < n_pairs; ++pair)
    for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
      const int64_t begin = tile * kTileColumns;
      const __mmask16 lanes = first_lanes(smaller(kTileColumns, arguments.n_columns - begin));
      pack_pair(arguments.grad_logits + begin, arguments.grad_logits_stride, 2 * pair, arguments.n_rows, lanes,
                packed_gradient + (tile - tile_begin) * n_pairs + pair);
    }
}

// grad_weight[column, :] += sums, for n_columns <= kTileColumns columns and the lanes that exist
static void add_tile(const PackedPairs* gradient,  // [n_pairs]
                     const PackedPairs* states,    // [n_pairs, 2]
                     int64_t n_pairs,
                     float* grad_weight,  // [n_columns, kTileHidden], rows `stride` apart
                     int64_t stride, int64_t n_columns, __mmask16 first, __mmask16 second) {
  __m512 sums[kTileColumns][2];
#pragma GCC unroll 14
  for (int column = 0; column < kTileColumns; ++column) sums[column][0] = sums[column][1] = _mm512_setzero_ps();
  for (int column = 0; column < n_columns; ++column) {
    _mm_prefetch(grad_weight + column * stride, _MM_HINT_T1);
    _mm_prefetch(grad_weight + column * stride + 16, _MM_HINT_T1);
  }
  for (int64_t pair = 0; pair < n_pairs; ++pair) {
    const __m512bh of_first = (__m512bh)_mm512_load_si512(states + 2 * pair),
                   of_second = (__m512bh)_mm512_load_si512(states + 2 * pair + 1);
#pragma GCC unroll 14
    for (int column = 0; column < kTileColumns; ++column) {
      const __m512bh of_column = (__m512bh)_mm512_set1_epi32(int(gradient[pair].pairs[column]));
      sums[column][0] = _mm512_dpbf16_ps(sums[column][0], of_column, of_first);
      sums[column][1] = _mm512_dpbf16_ps(sums[column][1], of_column, of_second);
    }
  }
#pragma GCC unroll 14
  for (int column = 0; column < kTileColumns; ++column) {
    if (column >= n_columns) break;
    float* row = grad_weight + column * stride;
    _mm512_mask_storeu_ps(row, first, _mm512_add_ps(_mm512_maskz_loadu_ps(first, row), sums[column][0]));
    _mm512_mask_storeu_ps(row + 16, second, _mm512_add_ps(_mm512_maskz_loadu_ps(second, row + 16), sums[column][1]));
  }
}

static void add_columns(const WeightGradientArguments& arguments, int64_t tile_begin, int64_t tile_end,
                        const PackedPairs* packed_states, PackedPairs* packed_gradient) {
  pack_gradient(arguments, tile_begin, tile_end, packed_gradient);
  const int64_t n_pairs = n_pairs_of(arguments), hidden_size = arguments.hidden_size;
  for (int64_t hidden_tile = 0; hidden_tile < n_hidden_tiles_of(arguments); ++hidden_tile) {
    const int64_t begin = hidden_tile * kTileHidden;
    const __mmask16 first = first_lanes(hidden_size - begin), second = first_lanes(hidden_size - begin - 16);
    for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
      const int64_t column = tile * kTileColumns;
      add_tile(packed_gradient + (tile - tile_begin) * n_pairs, packed_states + hidden_tile * n_pairs * 2, n_pairs,
               arguments.grad_weight + column * hidden_size + begin, hidden_size,
               smaller(kTileColumns, arguments.n_columns - column), first, second);
    }
  }
}

}  // namespace AVA_ISA
}  // namespace ava

const ava::WeightGradientKernels ava::weight_gradient_avx512bf16 = {ava::pack_states, ava::add_columns};
AVA_END_OF_TARGET
#endif
