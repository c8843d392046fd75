// The schemas of all operators: the table of contents of this library.
#include <string>

#include "box.h"
#include "cpu/capability.h"
#include "torch_stable.h"

#ifndef AVA_CUDA_VERSION
#define AVA_CUDA_VERSION ""
#endif

static std::string cpu_capability() { return ava::name(ava::cpu_capability()); }
static std::string cuda_version() { return AVA_CUDA_VERSION; }

STABLE_TORCH_LIBRARY(ava_ext, m) {
  // int[]?: None is the empty list, which is how AOTInductor hands one over
  //
  // rows of logits: softmax_rows.h. options: RowOptions [8]; flags: RowFlags
  //
  // ids (also candidate_ids) are int32 or int64; those of rows that do not count (ignored, masked, or with a count of 0
  // in their statistics) are not looked at. -1 is absent, unless flags have kIdsArePresent. What else is outside [0, vocab_size) is
  // an IndexError on the CPU, found before it is narrowed, and a device assert on CUDA; so are targets other than
  // ignore_index.
  //
  // column_weights: [..., vocab_size] or [vocab_size], or more columns, any leading strides; where flags have kTargetProbabilities or
  // kSmoothingWeights, and only there.
  //
  // row_terms: [kRowTerms + n_groups, ...], and with kRanks two more
  m.def(
      "row_loss(Tensor logits, Tensor targets, Tensor options, Tensor? row_weights, Tensor? candidate_ids, "
      "Tensor? candidate_weights, SymInt[]? candidate_groups, int flags, int vocab_size, int ignore_index, "
      "bool with_gradient, bool with_statistics, Tensor? column_weights=None) "
      "-> (Tensor row_loss, Tensor row_terms, Tensor grad_logits, Tensor statistics, Tensor row_coefficients)");
  m.def(
      "row_loss_(Tensor(a!) logits, Tensor targets, Tensor options, Tensor? row_weights, Tensor? candidate_ids, "
      "Tensor? candidate_weights, SymInt[]? candidate_groups, int flags, int vocab_size, int ignore_index, "
      "Tensor? column_weights=None) -> (Tensor row_loss, Tensor row_terms)");
  m.def(
      "row_statistics(Tensor logits, Tensor? ids, Tensor? row_mask, Tensor options, int flags, int vocab_size) "
      "-> (Tensor statistics, Tensor log_probs, Tensor summaries)");
  m.def(
      "row_gradient(Tensor logits, Tensor statistics, Tensor row_coefficients, Tensor? ids, Tensor options, "
      "int flags, int vocab_size, Tensor? column_weights=None) -> Tensor grad_logits");
  m.def(
      "row_gradient_(Tensor(a!) logits, Tensor statistics, Tensor row_coefficients, Tensor? ids, "
      "Tensor options, int flags, int vocab_size, Tensor? column_weights=None) -> ()");
  // rows times factors, but for those whose target is ignore_index: they hold zeros, which a factor of nan would spoil
  m.def("scale_rows_(Tensor(a!) rows, Tensor factors, Tensor? targets=None, int ignore_index=-100) -> ()");

  // token sequences: repetition.h
  m.def(
      "repetition_candidates(Tensor tokens, Tensor targets, Tensor? segments, Tensor weights, *, "
      "bool tokens_include_row, int vocab_size, int ignore_index, int[]? repetition_allow_list, "
      "bool use_immediate_repetition_penalty, int immediate_repetition_threshold, int ngram_size, "
      "int ngram_window_size, int ngram_slots, int[]? eos_ids, int min_sequence_length) "
      "-> (Tensor ids, Tensor candidate_weights)");

  // which rows count, and N: row_weights.h
  m.def(
      "count_rows(Tensor targets, Tensor? keep, Tensor? token_weights, Tensor? class_weights, Tensor? n_items, "
      "int ignore_index, bool is_mean, bool is_double) "
      "-> (Tensor counted_targets, Tensor n_counted, Tensor weights)");

  // rows of a mixture of experts' router: router_rows.h
  m.def(
      "router_statistics(Tensor[] gate_logits, Tensor? expert_indices, Tensor? row_mask, Tensor? segment_ids, "
      "Tensor? expert_bias, SymInt n_segments, int k, bool is_sigmoid) "
      "-> (Tensor probability_sum, Tensor importance_sum, Tensor lse_squared_sum, Tensor entropy_sum, Tensor counts, "
      "Tensor n_rows, Tensor expert_choice)");
  m.def(
      "router_gradient(Tensor[] gate_logits, Tensor? expert_indices, Tensor? expert_choice, Tensor? row_mask, "
      "Tensor? segment_ids, Tensor? grad_probability_sum, Tensor? grad_importance_sum, "
      "Tensor? grad_lse_squared_sum, Tensor? grad_entropy_sum, SymInt n_segments, bool is_sigmoid) "
      "-> Tensor grad_logits");

  // the state of the adaptive temperature: temperature.h
  m.def(
      "temperature_step_(Tensor(a!) value, Tensor(b!) history, Tensor(c!) count, Tensor(d!) pending_loss, "
      "Tensor(e!) pending_rows, float initial, float gain, float low, float high) -> ()");

  // the gradient of a linear layer's weight: cpu/weight_gradient.h
  m.def("add_weight_gradient_(Tensor(a!) grad_weight, Tensor grad_logits, Tensor hidden_states) -> ()");
  m.def("has_bfloat16_products() -> bool");

  // frees what the pool of CPU gradients keeps, cpu/gradient_pool.h; returns its bytes
  m.def("empty_cache() -> int");

  // which instruction set the CPU kernels use
  m.def("cpu_capability() -> str");
  // of the toolkit that compiled the CUDA kernels; empty where there are none
  m.def("cuda_version() -> str");
}
STABLE_TORCH_LIBRARY_IMPL(ava_ext, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", AVA_BOX(&cpu_capability));
  m.impl("cuda_version", AVA_BOX(&cuda_version));
}
