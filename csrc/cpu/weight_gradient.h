// The gradient of the weight of a linear layer from some rows of bfloat16, added up in float32:
//
//     grad_weight[v, h] += sum_r grad_logits[r, v] hidden_states[r, h]
//
// torch has no such product on the CPU: its bfloat16 product rounds the result to bfloat16 for every group of rows, and
// a float32 product needs float32 copies and twice the instructions. AVX512-BF16 has the instruction for it, vdpbf16ps,
// which takes two rows at once: in each of 16 lanes, sum += first[1] second[1], then sum += first[0] second[0].
//
// Packing. The instruction wants the elements of the rows 2p and 2p + 1 side by side, as pairs of 32 bits. Both
// operands are therefore copied, cut into what one tile of the result needs, in the order in which it reads them:
//
//     gradient tile  [n_pairs][16]  of kTileColumns = 14 columns v (two lanes stay unused)
//     states tile    [n_pairs][32]  of kTileHidden  = 32 positions h
//
// Where there is no row, column or position, the pairs hold zeros: an odd row and the edges need no code of their own,
// except that only what exists is added to grad_weight.
//
// Tiles. 14 x 32 sums stay in 28 registers while all pairs of rows go by: for each, 2 loads of states, 14 broadcasts of
// gradients and 28 products, so that the products are what takes the time. Only then grad_weight is read and written,
// once per call (and once more for every further kMostRows rows).
//
// Caches. A thread packs as many gradient tiles as fill a part of its L2 cache (kGradientBytes), and takes all of them
// through one states tile after the other. The states tiles are packed once for all threads, and come from the L3 cache
// once for each such block of columns.
//
//     for each group of at most kMostRows rows
//       in parallel: pack the states tiles
//       in parallel, for each block of columns
//         pack its gradient tiles
//         for each states tile, for each gradient tile: the sums, then grad_weight += sums
//
// Error. A product of two bfloat16 numbers is exact in float32, so each of n_rows additions rounds once, and so does
// the one to grad_weight:
//
//     |error| <= n_rows 2^-24 sum_r |grad_logits[r, v]| |hidden_states[r, h]| + 2^-24 |grad_weight[v, h]|
//
// (the last for each group of rows), and in the mean much less: 2.3e-7 of the norm for 900 random rows, a float32
// product by MKL 1.0e-7. vdpbf16ps knows no subnormal numbers, whatever MXCSR says: an element below 2^-126 counts as 0
// (an error below 2^-126 times the other element), and so does a sum (below 2^-126 for each row). Infinities and nans
// come through as in any product.
//
// The order of additions depends on n_rows alone: the result is bitwise the same for every number of threads and
// however the columns are cut.
#pragma once
#include <stdint.h>

#include "../element_type.h"

namespace ava {

constexpr int64_t kTileColumns = 14, kTileHidden = 32;
constexpr int64_t kMostRows = 2048;                     // at once: 128 KiB of states tile
constexpr int64_t kGradientBytes = int64_t(256) << 10;  // of packed gradient tiles: an L2 cache has 1 MiB or more

// 16 pairs, of one position or column each: the elements of an even row (low half) and of the odd row that follows it.
struct alignas(64) PackedPairs {
  uint32_t pairs[16];
};

struct WeightGradientArguments {
  float* grad_weight;                                // [n_columns, hidden_size], contiguous
  const BFloat16* grad_logits;                       // [n_rows, n_columns], last stride 1
  const BFloat16* hidden_states;                     // [n_rows, hidden_size], last stride 1
  int64_t grad_logits_stride, hidden_states_stride;  // of the rows
  int64_t n_rows, n_columns, hidden_size;
};

inline namespace AVA_ISA {
inline int64_t divided_up(int64_t n, int64_t size) { return (n + size - 1) / size; }
inline int64_t n_pairs_of(const WeightGradientArguments& arguments) { return divided_up(arguments.n_rows, 2); }
inline int64_t n_column_tiles_of(const WeightGradientArguments& arguments) {
  return divided_up(arguments.n_columns, kTileColumns);
}
inline int64_t n_hidden_tiles_of(const WeightGradientArguments& arguments) {
  return divided_up(arguments.hidden_size, kTileHidden);
}
}  // namespace AVA_ISA

struct WeightGradientKernels {
  // states tiles [tile_begin, tile_end) into packed_states [n_hidden_tiles, n_pairs, 2]
  void (*pack_states)(const WeightGradientArguments&, int64_t tile_begin, int64_t tile_end, PackedPairs* packed_states);
  // columns of the tiles [tile_begin, tile_end); packed_gradient [tile_end - tile_begin, n_pairs] is room to work in
  void (*add_columns)(const WeightGradientArguments&, int64_t tile_begin, int64_t tile_end,
                      const PackedPairs* packed_states, PackedPairs* packed_gradient);
};

// for processors with AVX512-BF16
extern const WeightGradientKernels weight_gradient_avx512bf16;

}  // namespace ava
