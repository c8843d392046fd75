// The schemas of all operators: the table of contents of this library.
#include <string>

#include "cpu/capability.h"
#include "torch_stable.h"

static std::string cpu_capability() { return ava::name(ava::cpu_capability()); }

STABLE_TORCH_LIBRARY(ava_ext, m) {
  // which instruction set the CPU kernels use
  m.def("cpu_capability() -> str");
  // token sequences: what would repeat, and how much each is penalised
  m.def(
      "repetition_candidates(Tensor tokens, Tensor targets, Tensor? segments, Tensor weights, *, "
      "bool tokens_include_row, int vocab_size, int ignore_index, int[] excluded_ids, bool immediate, "
      "int immediate_threshold, int ngram_size, int ngram_window, int ngram_slots, int[] eos_ids, "
      "int min_sequence_length) -> (Tensor ids, Tensor candidate_weights)");
}
STABLE_TORCH_LIBRARY_IMPL(ava_ext, CompositeExplicitAutograd, m) { m.impl("cpu_capability", TORCH_BOX(&cpu_capability)); }
