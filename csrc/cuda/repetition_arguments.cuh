// What the kernels of repetition candidates are given, and what each of them asks of a token.
#pragma once
#include <algorithm>
#include <vector>

#include "../repetition.h"
#include "primitives.cuh"

namespace ava {

// base^exponent, exponent >= 0. pow is a call, over which registers are spilled.
__device__ inline double power(double base, int64_t exponent) {
  double result = 1;
#pragma unroll 1
  for (; exponent > 0; exponent >>= 1, base *= base)
    if (exponent & 1) result *= base;
  return result;
}

// A [batch_size, n_tokens] tensor of int32 or int64 with any strides; batch size 1 stands for every sequence.
struct TokenMatrix {
  const void* data;
  bool is_int32;
  int64_t batch_stride, stride;  // in elements

  __device__ int64_t at(int64_t sequence, int64_t position) const {
    const int64_t offset = sequence * batch_stride + position * stride;
    return is_int32 ? static_cast<const int32_t*>(data)[offset] : static_cast<const int64_t*>(data)[offset];
  }
};

template <class Weight>
struct RepetitionArguments {
  TokenMatrix tokens, targets, segments;  // segments.data may be null
  const Weight* weights;                  // [kRepetitionWeights]: immediate, growth, EOS, n-gram
  int64_t weight_stride;
  const int32_t* repetition_allow_list;  // [n_allowed], sorted
  const int32_t* eos_ids;                // [n_eos]
  int64_t n_allowed, n_eos;
  int64_t n_sequences, n_tokens;
  // as in RepetitionOptions
  int64_t vocab_size, ignore_index, immediate_repetition_threshold, ngram_size, ngram_window_size, ngram_slots,
      min_sequence_length;
  bool tokens_include_row, use_immediate_repetition_penalty;
  int32_t* ids;               // [n_sequences, n_tokens, n_slots]
  Weight* candidate_weights;  // [n_sequences, n_tokens, n_slots]
  // of repetition_kernel: whether it writes the slots before those of n-grams; numbers that are all 0 where it need not run
  bool reads_runs = true;
  const int32_t* collisions = nullptr;
  int64_t n_collisions = 0;

  void set_options(const RepetitionOptions& options,
                   const int32_t* id_lists) {  // [n_allowed + n_eos], on the device
    repetition_allow_list = id_lists;
    n_allowed = int64_t(options.repetition_allow_list.size());
    eos_ids = id_lists + n_allowed;
    n_eos = int64_t(options.eos_ids.size());
    vocab_size = options.vocab_size;
    ignore_index = options.ignore_index;
    immediate_repetition_threshold = options.immediate_repetition_threshold;
    ngram_size = options.ngram_size;
    ngram_window_size = options.ngram_window_size;
    ngram_slots = options.ngram_slots;
    min_sequence_length = options.min_sequence_length;
    tokens_include_row = options.tokens_include_row;
    use_immediate_repetition_penalty = options.use_immediate_repetition_penalty;
  }
  __host__ __device__ int64_t first_ngram_slot() const { return use_immediate_repetition_penalty + n_eos; }
  __host__ __device__ int64_t n_slots() const { return first_ngram_slot() + (ngram_size > 0 ? ngram_slots : 0); }

  __device__ double weight(int index) const { return double(weights[index * weight_stride]); }
  __device__ bool may_penalize(int64_t token) const {
    if (token < 0 || token >= vocab_size || token == ignore_index) return false;
    int64_t first = 0, last = n_allowed;  // the first excluded id that is not below the token
    while (first < last) {
      const int64_t middle = (first + last) / 2;
      if (repetition_allow_list[middle] < token)
        first = middle + 1;
      else
        last = middle;
    }
    return first == n_allowed || repetition_allow_list[first] != token;
  }
  __device__ bool is_eos(int64_t token) const {
    for (int64_t i = 0; i < n_eos; ++i)
      if (eos_ids[i] == token) return true;
    return false;
  }
};

// Lists of ids travel to the device as arguments of a launch: a copy from host memory could neither be captured in a
// CUDA graph nor outlive the call.
constexpr int kIdsPerLaunch = 512;
struct IdChunk {
  int32_t ids[kIdsPerLaunch];
  int n_ids;
};

static __global__ void store_ids_kernel(const IdChunk chunk,
                                        int32_t* out) {  // [chunk.n_ids]
  for (int i = threadIdx.x; i < chunk.n_ids; i += blockDim.x) out[i] = chunk.ids[i];
}

inline void store_ids(const std::vector<int32_t>& ids,
                      int32_t* out,  // [ids.size()], on the device
                      Stream stream) {
  for (size_t first = 0; first < ids.size(); first += kIdsPerLaunch) {
    IdChunk chunk;
    chunk.n_ids = int(std::min<size_t>(kIdsPerLaunch, ids.size() - first));
    std::copy_n(ids.begin() + first, chunk.n_ids, chunk.ids);
    launch("repetition_candidates", store_ids_kernel, {dim3(1), dim3(128)}, stream, chunk, out + first);
  }
}

}  // namespace ava
