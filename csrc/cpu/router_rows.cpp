// The router family on the CPU: checks, outputs, threads, and the order in which blocks are added. The arithmetic is in
// router_rows_kernels.h.
#include <algorithm>
#include <atomic>
#include <memory>

#include "../router_rows_operators.h"
#include "capability.h"
#include "gradient_pool.h"
#include "router_rows_arguments.h"
#include "tensors.h"
#include "threads.h"

namespace ava {
namespace {

// Blocks are cut by the group's own rows, so that a result does not depend on the number of threads.
constexpr int64_t kRowsInBlock = 512;
// A second thread pays from about 1000 rows on, and where its core is busy it costs milliseconds.
constexpr int64_t kRowsOfThread = 512;

const RouterRowsKernels& router_kernels() {
#ifdef AVA_X86
  switch (cpu_capability()) {
    case CpuCapability::avx512: return router_rows_avx512;
    case CpuCapability::avx2: return router_rows_avx2;
    default: break;
  }
#endif
  return router_rows_portable;
}

// What both operators are given, and the blocks to run.
struct RouterRows : DenseTensors {
  RouterRowsArguments arguments{};
  std::vector<RowLayout> layouts;  // of the tensors of layers
  std::vector<RouterBlock> blocks;
  std::vector<int64_t> order;

  RouterRows(const char* op, const RouterShape& shape, const std::vector<Tensor>& gate_logits,
             const std::optional<Tensor>& expert_indices, const std::optional<Tensor>& row_mask,
             const std::optional<Tensor>& segment_ids, int64_t n_segments, bool is_sigmoid) {
    arguments.element_type = element_type(op, gate_logits[0]);
    arguments.n_experts = shape.n_experts;
    arguments.n_rows = shape.n_rows;
    arguments.is_sigmoid = is_sigmoid;
    set_choices_and_mask(arguments, shape, expert_indices, row_mask, *this);
    std::vector<int64_t> segment_ends(1, shape.n_rows);
    if (segment_ids) segment_ends = sort_by_segment(op, *segment_ids, n_segments);
    const int64_t element_bytes = gate_logits[0].element_size();
    layouts.reserve(gate_logits.size());
    int64_t layer = 0;
    for (const Tensor& layers : gate_logits) {
      layouts.push_back(layout_of(op, "gate_logits", layers, 1));
      for (int64_t of_tensor = 0; of_tensor < layers.size(0); ++of_tensor, ++layer) {
        const void* logits =
            static_cast<const char*>(layers.const_data_ptr()) + of_tensor * layers.stride(0) * element_bytes;
        for (int64_t segment = 0; segment < n_segments; ++segment)
          for (int64_t begin = segment ? segment_ends[segment - 1] : 0; begin < segment_ends[segment];
               begin += kRowsInBlock)
            blocks.push_back({logits, &layouts.back(), layer, layer * n_segments + segment, begin,
                              std::min(segment_ends[segment], begin + kRowsInBlock)});
      }
    }
  }

  // where each segment ends among the sorted rows; those of negative segments are behind all
  std::vector<int64_t> sort_by_segment(const char* op, const Tensor& segment_ids, int64_t n_segments) {
    const auto* ids = static_cast<const int64_t*>(dense(segment_ids));
    std::vector<int64_t> next(n_segments + 1, 0);
    for (int64_t row = 0; row < arguments.n_rows; ++row) {
      if (ids[row] >= n_segments)
        fail_index(op, ": expected segment_ids below n_segments = ", n_segments, ", got ", ids[row], " in row ", row);
      if (ids[row] >= 0) ++next[ids[row] + 1];
    }
    for (int64_t segment = 0; segment < n_segments; ++segment) next[segment + 1] += next[segment];
    order.resize(next[n_segments]);
    for (int64_t row = 0; row < arguments.n_rows; ++row)
      if (ids[row] >= 0) order[next[ids[row]]++] = row;
    arguments.order = order.data();
    next.pop_back();  // each has moved to its segment's end
    return next;
  }

  // work(block, scratch) for every block, by torch's threads
  template <class Work>
  void for_blocks(Work work) const {
    const int64_t n_blocks = int64_t(blocks.size());
    if (n_blocks == 0) return;
    int64_t n_rows = 0;
    for (const RouterBlock& block : blocks) n_rows += block.end - block.begin;
    const int64_t worth_it = std::max<int64_t>(1, n_rows / kRowsOfThread);
    const int64_t n_threads = std::min<int64_t>({n_blocks, worth_it, torch::stable::get_num_threads()});
    std::atomic<int64_t> next{0};
    in_threads(n_threads, [&] {
      constexpr size_t kAlignment = 64;  // of a register that lies in one cache line
      size_t bytes = router_scratch_bytes(arguments.n_experts) + kAlignment;
      std::vector<char> scratch(bytes);
      void* aligned = scratch.data();
      std::align(kAlignment, bytes - kAlignment, aligned, bytes);
      for (int64_t block; (block = next.fetch_add(1)) < n_blocks;) work(block, aligned);
    });
  }
};

template <class Real>
void write_sums(const RouterRows& rows, const std::vector<RouterSums>& sums, int64_t n_groups, void* probability,
                void* importance, void* lse_squared, void* entropy, int64_t* counts, int64_t* n_rows) {
  const int64_t n_experts = rows.arguments.n_experts;
  std::vector<double> vectors(2 * n_experts);
  size_t block = 0;
  for (int64_t group = 0; group < n_groups; ++group) {
    std::fill(vectors.begin(), vectors.end(), 0);
    int64_t* const group_counts = counts + group * n_experts;
    std::fill(group_counts, group_counts + n_experts, 0);
    double scalars[2] = {0, 0};
    n_rows[group] = 0;
    for (; block < sums.size() && rows.blocks[block].group == group; ++block) {
      for (int64_t e = 0; e < 2 * n_experts; ++e) vectors[e] += sums[block].vectors[e];
      for (int64_t e = 0; e < n_experts; ++e) group_counts[e] += sums[block].counts[e];
      for (int scalar = 0; scalar < 2; ++scalar) scalars[scalar] += sums[block].scalars[scalar];
      n_rows[group] += sums[block].counts[n_experts];
    }
    for (int64_t e = 0; e < n_experts; ++e) {
      static_cast<Real*>(probability)[group * n_experts + e] = Real(vectors[e]);
      static_cast<Real*>(importance)[group * n_experts + e] = Real(vectors[n_experts + e]);
    }
    static_cast<Real*>(lse_squared)[group] = Real(scalars[0]);
    static_cast<Real*>(entropy)[group] = Real(scalars[1]);
  }
}

void check_indices(const RouterRows& rows, const std::vector<RouterSums>& sums) {
  for (size_t block = 0; block < sums.size(); ++block) {
    if (sums[block].bad_row < 0) continue;
    const RouterRowsArguments& arguments = rows.arguments;
    const int64_t layer = rows.blocks[block].layer, row = sums[block].bad_row;
    for (int64_t slot = 0; slot < arguments.k; ++slot) {
      const int64_t at = (layer * arguments.n_rows + row) * arguments.k + slot;
      const int64_t e = arguments.wide_indices ? arguments.wide_indices[at] : arguments.indices[at];
      if (e < 0 || e >= arguments.n_experts)
        fail_index("router_statistics: expected expert_indices in [0, ", arguments.n_experts, "), got ", e,
                   " in layer ", layer, ", row ", row);
    }
  }
}

RouterOutputs router_statistics(std::vector<Tensor> gate_logits,       // of [n_layers, ..., n_experts]
                                std::optional<Tensor> expert_indices,  // [n_layers, n_rows, k]
                                std::optional<Tensor> row_mask,        // [n_rows] or [n_layers, n_rows]
                                std::optional<Tensor> segment_ids,     // [n_rows]
                                std::optional<Tensor> expert_bias,     // [n_layers, n_experts]
                                int64_t n_segments, int64_t k, bool is_sigmoid) {
  const RouterShape shape =
      check_router_statistics(gate_logits, expert_indices, row_mask, segment_ids, expert_bias, n_segments, k);
  RouterRows rows("router_statistics", shape, gate_logits, expert_indices, row_mask, segment_ids, n_segments,
                  is_sigmoid);
  const int64_t n_groups = shape.n_layers * n_segments, n_experts = shape.n_experts;
  Tensor choice = empty_tensor(expert_indices ? std::vector<int64_t>{0} : choice_sizes(shape), ScalarType::Byte);
  if (!expert_indices) {
    rows.arguments.k = k;
    rows.arguments.new_choice = static_cast<uint8_t*>(choice.mutable_data_ptr());
    std::fill_n(rows.arguments.new_choice, choice.numel(), 0);
    rows.arguments.expert_bias = rows.dense(expert_bias);
  }
  const size_t n_blocks = rows.blocks.size();
  std::vector<double> doubles(n_blocks * (2 * n_experts + 2));
  std::vector<int64_t> integers(n_blocks * (n_experts + 1));
  std::vector<RouterSums> sums(n_blocks);
  for (size_t block = 0; block < n_blocks; ++block) {
    double* const of_block = doubles.data() + block * (2 * n_experts + 2);
    sums[block] = {of_block, of_block + 2 * n_experts, integers.data() + block * (n_experts + 1), -1};
  }
  rows.for_blocks([&](int64_t block, void* scratch) {
    router_kernels().measure(rows.arguments, rows.blocks[block], sums[block], scratch);
  });
  if (expert_indices) check_indices(rows, sums);

  const std::vector<int64_t> vectors = {n_groups, n_experts}, scalars = {n_groups};
  Tensor counts = empty_tensor(vectors, ScalarType::Long), n_rows = empty_tensor(scalars, ScalarType::Long),
         probability = empty_tensor(vectors, shape.real), importance = empty_tensor(vectors, shape.real),
         lse_squared = empty_tensor(scalars, shape.real), entropy = empty_tensor(scalars, shape.real);
  const auto write = shape.real == ScalarType::Double ? write_sums<double> : write_sums<float>;
  write(rows, sums, n_groups, probability.mutable_data_ptr(), importance.mutable_data_ptr(),
        lse_squared.mutable_data_ptr(), entropy.mutable_data_ptr(), static_cast<int64_t*>(counts.mutable_data_ptr()),
        static_cast<int64_t*>(n_rows.mutable_data_ptr()));
  return {probability, importance, lse_squared, entropy, counts, n_rows, choice};
}

Tensor router_gradient(std::vector<Tensor> gate_logits,         // of [n_layers, ..., n_experts]
                       std::optional<Tensor> expert_indices,    // [n_layers, n_rows, k]
                       std::optional<Tensor> expert_choice,     // [n_layers, n_rows, bytes]: own ones
                       std::optional<Tensor> row_mask,          // [n_rows] or [n_layers, n_rows]
                       std::optional<Tensor> segment_ids,       // [n_rows]
                       std::optional<Tensor> grad_probability,  // [n_groups, n_experts]
                       std::optional<Tensor> grad_importance,   // [n_groups, n_experts]
                       std::optional<Tensor> grad_lse_squared,  // [n_groups]
                       std::optional<Tensor> grad_entropy,      // [n_groups]
                       int64_t n_segments, bool is_sigmoid) {
  const RouterShape shape =
      check_router_gradient(gate_logits, expert_indices, expert_choice, row_mask, segment_ids, grad_probability,
                            grad_importance, grad_lse_squared, grad_entropy, n_segments);
  RouterRows rows("router_gradient", shape, gate_logits, expert_indices, row_mask, segment_ids, n_segments, is_sigmoid);
  rows.arguments.choice = static_cast<const uint8_t*>(rows.dense(expert_choice));
  rows.arguments.grad_probability = rows.dense(grad_probability);
  rows.arguments.grad_importance = rows.dense(grad_importance);
  rows.arguments.grad_lse_squared = rows.dense(grad_lse_squared);
  rows.arguments.grad_entropy = rows.dense(grad_entropy);
  Tensor grad_logits = pooled_empty(contiguous_layout(shape.gradient), gate_logits[0]);
  rows.arguments.grad_logits = grad_logits.mutable_data_ptr();
  if (segment_ids && int64_t(rows.order.size()) < shape.n_rows)  // rows without a segment are in no block
    std::fill_n(static_cast<char*>(rows.arguments.grad_logits), grad_logits.numel() * grad_logits.element_size(), 0);
  rows.for_blocks([&](int64_t block, void* scratch) {
    router_kernels().differentiate(rows.arguments, rows.blocks[block], scratch);
  });
  return grad_logits;
}

}  // namespace
}  // namespace ava

STABLE_TORCH_LIBRARY_IMPL(ava_ext, CPU, m) {
  m.impl("router_statistics", AVA_BOX(&ava::router_statistics));
  m.impl("router_gradient", AVA_BOX(&ava::router_gradient));
}
