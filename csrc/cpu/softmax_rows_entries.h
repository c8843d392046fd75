// The columns of one row that have an s_c of their own: its target, its candidates. Included by softmax_rows_gradient.h.
#pragma once
#include "softmax_rows_arguments.h"

namespace ava {
inline namespace AVA_ISA {

// One column that has an s_c.
template <class Real>
struct RowEntry {
  int64_t column;
  Real u, probability, own, gradient;
  bool is_named;  // behind kTailId
};
static_assert(sizeof(RowEntry<double>) <= kEntryBytes);

// The entries of a row, one for a column, in the order in which they came. Many of them are found by hashing: open
// addressing, at most half full.
template <class Real>
struct RowEntries {
  using Entry = RowEntry<Real>;
  Entry* entries;
  int32_t* slots;   // [n_slots]: numbers of entries, -1: free
  int64_t n_slots;  // a power of 2; 0: few enough to look at each
  int64_t n = 0;

  RowEntries(void* scratch, int64_t n_ids)
      : entries(static_cast<Entry*>(scratch)),
        slots(reinterpret_cast<int32_t*>(entries + n_ids + 2)),
        n_slots(slots_of_entries(n_ids)) {}

  void clear() {
    n = 0;
    for (int64_t slot = 0; slot < n_slots; ++slot) slots[slot] = -1;
  }
  // adds s to the entry of this column, or makes one
  void add(int64_t column, Real u, Real probability, Real s, bool is_named = false) {
    Entry* entry = find_or_claim(column);
    if (entry) {
      entry->own += s;
      entry->is_named |= is_named;
      return;
    }
    entries[n++] = {column, u, probability, s, 0, is_named};
  }

  // the entry of this column; where there is none, its slot is that of the next one
  Entry* find_or_claim(int64_t column) {
    if (n_slots == 0) {
      for (int64_t k = 0; k < n; ++k)
        if (entries[k].column == column) return entries + k;
      return nullptr;
    }
    const uint64_t hash = uint64_t(column) * 0x9e3779b97f4a7c15ull >> 32;
    for (uint64_t slot = hash & uint64_t(n_slots - 1);; slot = (slot + 1) & uint64_t(n_slots - 1)) {
      if (slots[slot] < 0) {
        slots[slot] = int32_t(n);
        return nullptr;
      }
      if (entries[slots[slot]].column == column) return entries + slots[slot];
    }
  }
};

}  // namespace AVA_ISA
}  // namespace ava
