// Which rows count, their weights, and N, what the sum of their losses is divided by. Free of torch.
//
//   a row counts    its target is not ignore_index, and it is kept
//   weight          token weight / N; 0 where the row does not count
//   N under mean    n_items if given; else with class weights, the sum over the rows that count of token weight times
//                   class weight, or if that is 0, the sum of token weights; else the sum of token weights; else the
//                   number of rows. 1 where it is 0
//   N otherwise     1
#pragma once
#include "element_type.h"

namespace ava {

// A value for each token of a batch, with any strides.
template <class Value>
struct TokenGrid {
  const Value* data;             // null: not given
  int64_t batch_stride, stride;  // in elements

  AVA_HOST_DEVICE const Value& at(int64_t sequence, int64_t position) const {
    return data[sequence * batch_stride + position * stride];
  }
};

template <class Real>
struct RowWeights {
  TokenGrid<int64_t> targets;     // [batch_size, n_tokens]
  TokenGrid<bool> keep;           // [batch_size, n_tokens]
  TokenGrid<Real> token_weights;  // [batch_size, n_tokens]
  const Real* class_weights;      // [n_classes], or null
  const Real* n_items;            // [], or null
  int64_t batch_size, n_tokens, n_classes, ignore_index;
  bool is_mean;
  int64_t* counted_targets;  // [batch_size, n_tokens]: ignore_index where the row does not count
  Real* weights;             // [batch_size, n_tokens]
  Real* n_counted;           // []
};

// Sums over rows. In double: a float would stop counting at 2^24.
struct RowSums {
  double n_counted, weights, of_classes;

  AVA_HOST_DEVICE void add(const RowSums& other) {
    n_counted += other.n_counted;
    weights += other.weights;
    of_classes += other.of_classes;
  }
};

inline namespace AVA_ISA {

template <class Real>
AVA_HOST_DEVICE bool row_counts(const RowWeights<Real>& rows, int64_t sequence, int64_t position) {
  return rows.targets.at(sequence, position) != rows.ignore_index &&
         (!rows.keep.data || rows.keep.at(sequence, position));
}

template <class Real>
AVA_HOST_DEVICE Real token_weight(const RowWeights<Real>& rows, int64_t sequence, int64_t position) {
  return rows.token_weights.data ? rows.token_weights.at(sequence, position) : Real(1);
}

template <class Real>
AVA_HOST_DEVICE RowSums sums_of_row(const RowWeights<Real>& rows, int64_t sequence, int64_t position) {
  if (!row_counts(rows, sequence, position)) return {};
  const double weight = token_weight(rows, sequence, position);
  if (!rows.class_weights) return {1, weight, 0};
  const int64_t target = rows.targets.at(sequence, position);  // what is no class is reported where the loss reads it
  const int64_t last = rows.n_classes - 1;
  return {1, weight, weight * rows.class_weights[target < 0 ? 0 : target > last ? last : target]};
}

template <class Real>
AVA_HOST_DEVICE Real denominator(const RowWeights<Real>& rows, const RowSums& sums) {
  if (!rows.is_mean) return 1;
  const Real n = rows.n_items                                 ? *rows.n_items
                 : rows.class_weights && sums.of_classes != 0 ? Real(sums.of_classes)
                                                              : Real(sums.weights);
  return n == 0 ? 1 : n;
}

template <class Real>
AVA_HOST_DEVICE void write_row(const RowWeights<Real>& rows, int64_t sequence, int64_t position, Real n) {
  const int64_t place = sequence * rows.n_tokens + position;
  const bool counts = row_counts(rows, sequence, position);
  rows.counted_targets[place] = counts ? rows.targets.at(sequence, position) : rows.ignore_index;
  rows.weights[place] = counts ? token_weight(rows, sequence, position) / n : Real(0);
}

}  // namespace AVA_ISA
}  // namespace ava
