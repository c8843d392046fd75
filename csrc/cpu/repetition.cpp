// repetition_candidates on the CPU: threads over sequences, any strides and integer types. The algorithm is in
// ../repetition.h.
#include "../repetition.h"

#include <algorithm>
#include <optional>
#include <vector>

#include "../repetition_operators.h"
#include "threads.h"

namespace ava {

// A [batch_size, n_tokens] tensor of int32 or int64 with any strides; batch size 1 stands for every sequence.
struct TokenRows {
  explicit TokenRows(const Tensor& tensor)
      : data(tensor.const_data_ptr()),
        is_int32(tensor.scalar_type() == ScalarType::Int),
        batch_stride(tensor.size(0) == 1 ? 0 : tensor.stride(0)),
        stride(tensor.stride(1)) {}

  void read(int64_t sequence, std::vector<int64_t>& out) const {
    if (is_int32)
      copy(static_cast<const int32_t*>(data) + sequence * batch_stride, out);
    else
      copy(static_cast<const int64_t*>(data) + sequence * batch_stride, out);
  }

 private:
  template <class Integer>
  void copy(const Integer* row, std::vector<int64_t>& out) const {
    for (size_t t = 0; t < out.size(); ++t) out[t] = row[static_cast<int64_t>(t) * stride];
  }

  const void* data;
  bool is_int32;
  int64_t batch_stride, stride;
};

// What one thread works in, O(n_tokens); kept for its next call, so that only the first one pays for fresh memory.
struct RepetitionScratch {
  std::vector<int64_t> tokens, targets, segments;
  FollowerLists<> lists;
};

template <class Weight>
static void candidates_of_batch(const RepetitionOptions& options,
                                const Tensor& tokens,                   // [batch_size, n_tokens]
                                const Tensor& targets,                  // [batch_size, n_tokens]
                                const std::optional<Tensor>& segments,  // [batch_size or 1, n_tokens]
                                const Tensor& weights,                  // [kRepetitionWeights]
                                const Tensor& ids,                      // [batch_size, n_tokens, n_slots]
                                const Tensor& candidate_weights) {      // [batch_size, n_tokens, n_slots]
  const TokenRows token_rows(tokens), target_rows(targets), segment_rows(segments ? *segments : tokens);
  int32_t* const out_ids = static_cast<int32_t*>(ids.mutable_data_ptr());
  Weight* const out_weights = static_cast<Weight*>(candidate_weights.mutable_data_ptr());
  const Weight* weight = static_cast<const Weight*>(weights.const_data_ptr());
  const int64_t weight_stride = weights.stride(0);
  const RepetitionWeights values{weight[0], weight[weight_stride], weight[2 * weight_stride],
                                 weight[3 * weight_stride]};
  const int64_t n_tokens = tokens.size(1), n_slots = options.n_slots();
  // about 100 microseconds of work for a thread, below which waking it costs more
  const int64_t sequences_per_task = std::max<int64_t>(1, 2048 / std::max<int64_t>(1, n_tokens));

  parallel_for(tokens.size(0), sequences_per_task, [&](int64_t first, int64_t last) {
    static thread_local RepetitionScratch scratch;
    scratch.tokens.resize(n_tokens);
    scratch.targets.resize(n_tokens);
    scratch.segments.resize(segments ? n_tokens : 0);
    for (int64_t sequence = first; sequence < last; ++sequence) {
      token_rows.read(sequence, scratch.tokens);
      target_rows.read(sequence, scratch.targets);
      if (segments) segment_rows.read(sequence, scratch.segments);
      for (int64_t begin = 0, end; begin < n_tokens; begin = end) {
        end = segments ? begin + 1 : n_tokens;
        while (end < n_tokens && scratch.segments[end] == scratch.segments[begin]) ++end;
        const int64_t offset = (sequence * n_tokens + begin) * n_slots;
        segment_candidates(options, values, scratch.tokens.data() + begin, scratch.targets.data() + begin, end - begin,
                           scratch.lists, out_ids + offset, out_weights + offset);
      }
    }
  });
}

static void run_repetition_candidates(const RepetitionOptions& options,
                                      const Tensor& tokens,                   // [batch_size, n_tokens]
                                      const Tensor& targets,                  // [batch_size, n_tokens]
                                      const std::optional<Tensor>& segments,  // [batch_size or 1, n_tokens]
                                      const Tensor& weights,                  // [kRepetitionWeights]
                                      const Tensor& ids,                      // [batch_size, n_tokens, n_slots]
                                      const Tensor& candidate_weights) {      // [batch_size, n_tokens, n_slots]
  const bool is_double = weights.scalar_type() == ScalarType::Double;
  const auto candidates_of = is_double ? candidates_of_batch<double> : candidates_of_batch<float>;
  candidates_of(options, tokens, targets, segments, weights, ids, candidate_weights);
}

}  // namespace ava

STABLE_TORCH_LIBRARY_IMPL(ava_ext, CPU, m) {
  m.impl("repetition_candidates", AVA_BOX(&ava::repetition_candidates<ava::run_repetition_candidates>));
}
