// The mathematics of one row of logits, shared by every kernel and by the C++ tests. Free of torch.
//
// Effective logits  z = softcap(x) / T,  softcap(x) = c tanh(x / c) where asked for. Columns whose raw logit is -inf,
// and columns at or beyond vocab_size, are left out of everything; V is the number of those that remain. With m the
// maximum of z, at column i* (the lowest of equals), and u_j = z_j - m:
//
//   statistics     R = sum_{j != i*} e^{u_j}     B = sum_j u_j e^{u_j}     U = sum_j u_j     V
//   from them      S = 1 + R     p_j = e^{u_j} / S     E = B / S (mean of u)     lse = m + log1p(R)
//                  H = log1p(R) - E (entropy)     -log p_j = log1p(R) - u_j     1 - p_{i*} = R / S
//
// R leaves the maximum out: where the model is sure, 1 - p_{i*} = R / S stays exact although p_{i*} rounds to 1. Every
// other column has p_j <= 1/2, so that 1 - p_j does not cancel there either.
//
// Statistics are a monoid (`merge`), so lanes, blocks, vocabulary shards can be measured apart.
//
// Gradient. Every term's derivative is a combination of four shapes, so all terms together cost one pass over the row:
//
//   dz_j = a p_j + b p_j (u_j - E) + k + sum_c s_c (1(j = c) - p_j)                                               (1)
//
// `a` comes from lse, `b` from the entropy, `k` (and a) from the mean log-probability, and s_c is the derivative by
// log p_c of the target, of a candidate, or of the maximum. A candidate's penalty -w log(1 - p_c) has s_c = w p_c / (1
// - p_c), at the maximum w / R; a soft target's term -q log p_c has s_c = -q. Collected per column:
//
//   elsewhere          dz_j = p_j [ A + b (u_j - E) ] + k,                          A = a - sum_c s_c
//   at c != i*         dz_c = p_c [ A + s_c + b (u_c - E) ] + k + s_c (1 - p_c)
//   at i*              dz_i* = p_i* [ a - sum_{c != i*} s_c - b E ] + k + s_i* R / S
//
// s_i* may be 1e30 where a sure row repeats itself; it is never added to and subtracted from the same sum.
#pragma once
#include "scalar_math.h"

namespace ava {
inline namespace AVA_ISA {

// The smallest R that is told from 0: its inverse times a weight up to 30 is still a finite float.
template <class Real>
AVA_HOST_DEVICE Real smallest_rest() {
  return sizeof(Real) == 4 ? Real(1e-37) : Real(1e-300);
}

// Statistics of a row. As a tensor: [n_rows, kRowStatistics], in this order. A row that is left out (ignored, or
// nothing but masked columns) has count 0, and its gradient is zero.
template <class Real>
struct RowStatistics {
  Real max;       // of softcap(x), before the temperature, so that u of the maximum is exactly 0; -inf: nothing seen
  Real argmax;    // i*, a whole number; -1: nothing seen
  Real rest;      // R
  Real weighted;  // B
  Real sum;       // U
  Real count;     // V
};
constexpr int kRowStatistics = 6;

// What the open operator reports of a row, made of its statistics.
enum RowSummary { kEntropySummary, kLseSummary, kLogRestSummary, kMeanLogProbSummary, kRowSummaries };

template <class Real>
AVA_HOST_DEVICE RowStatistics<Real> empty_statistics() {
  return {Real(-INFINITY), Real(-1), Real(0), Real(0), Real(0), Real(0)};
}

// What a part of the columns adds to the sums about a maximum at another column, not below its own. Exact for an empty
// part: never e^-inf * -inf. A nan travels in `rest`, also out of an empty one.
template <class Real>
AVA_HOST_DEVICE RowStatistics<Real> below(const RowStatistics<Real>& part, Real max, Real inverse_temperature) {
  RowStatistics<Real> share = empty_statistics<Real>();
  share.rest = part.rest;  // of an empty part: 0, or nan
  if (part.max == Real(-INFINITY)) return share;
  const Real shift = (part.max - max) * inverse_temperature, factor = exp_of(shift), total = 1 + part.rest;
  if (factor > 0) share.weighted = factor * (part.weighted + shift * total);  // shift * total may be infinite
  share.rest = total * factor;
  share.sum = part.sum + shift * part.count;
  share.count = part.count;
  return share;
}

// Statistics of two disjoint sets of columns. A nan never wins the maximum.
template <class Real>
AVA_HOST_DEVICE RowStatistics<Real> merge(const RowStatistics<Real>& first, const RowStatistics<Real>& second,
                                          Real inverse_temperature) {
  const bool second_wins = second.max > first.max || (second.max == first.max && second.argmax < first.argmax);
  RowStatistics<Real> high = second_wins ? second : first;
  const RowStatistics<Real> low = second_wins ? first : second, share = below(low, high.max, inverse_temperature);
  high.rest += share.rest;
  high.weighted += share.weighted;
  high.sum += share.sum;
  high.count += share.count;
  return high;
}

// One more column, of effective logit `value` before the temperature: the scalar form of merge.
template <class Real>
AVA_HOST_DEVICE RowStatistics<Real> update(const RowStatistics<Real>& statistics, Real value, int64_t column,
                                           Real inverse_temperature) {
  RowStatistics<Real> one = empty_statistics<Real>();
  if (value != value) one.rest = value;
  if (value > Real(-INFINITY)) one.max = value, one.argmax = Real(column), one.count = 1;
  return merge(statistics, one, inverse_temperature);
}

// What the loss terms are made with. The values come in one small tensor, `options` [kRowOptions], in this order, so
// that a schedule may change them without a recompilation or a synchronisation; which terms are on (`flags`) is fixed.
template <class Real>
struct RowOptions {
  Real temperature;
  Real label_smoothing;  // e
  Real focal_alpha, focal_gamma;
  Real z_loss_weight;              // beta
  Real confidence_penalty_weight;  // eta
  Real softcap;                    // c
  Real reweighting_exponent;
};
constexpr int kRowOptions = 8;

// Bits of `flags`.
enum RowFlags : int64_t {
  kCrossEntropy = 1,    // the main term is on
  kFocal = 2,           // and modulated
  kLabelSmoothing = 4,  // and smoothed
  kExcludeTarget = 8,   // with e / (V - 1) on the other columns instead of e / V on all
  kZLoss = 16,
  kConfidencePenalty = 32,
  kSoftcap = 64,
  kEntropy = 128,        // measure the entropy although no term needs it
  kIdsArePresent = 256,  // an id of -1 in a row that counts is out of range; else it is absent
  // the target's term is weighted, by a constant: by p_t, or by H / log V, to the power of reweighting_exponent
  kDft = 512,
  kEaft = 1024,
  kSoftTargets = 2048,    // the last group of candidates are soft targets: -q log p_c in place of -w log(1 - p_c)
  kTargetWeights = 4096,  // the first group of candidates is one absent id, whose weight is that of the target's term
  kTail = 16384,          // the first of the soft targets is kTailId, whose weight is that of their tail
  // a weight q_j of every column comes beside the row: probabilities, whose term sum_j q_j (-log p_j) takes the place of
  // the target's, or what weighs the columns under label smoothing, e / V sum_j q_j (-log p_j)
  kTargetProbabilities = 8192,
  kSmoothingWeights = 32768,
  // report the target's rank and the maximum's column too: kRankTerms further rows of row_terms, behind the groups'
  kRanks = 65536,
  kNextFlag = 131072,
};
constexpr int64_t kColumnWeightFlags = kTargetProbabilities | kSmoothingWeights;
// In place of an id: all columns but those of the ids behind it.
constexpr int32_t kTailId = -2;
// Terms that need more of a row than its maximum and R.
constexpr int64_t kDenseFlags = kLabelSmoothing | kConfidencePenalty | kEntropy | kEaft | kColumnWeightFlags;

// The first rows of row_terms; one more follows for each group of candidates.
enum RowTerm {
  kMainLoss,
  kZLossTerm,
  kConfidencePenaltyTerm,
  kCrossEntropyMetric,
  kEntropyMetric,
  kCorrectMetric,
  kRowTerms
};

// With kRanks, both counted from 1, and 0 in a row that does not count. The rank is 1 and how many columns have a greater
// logit than the target, as the logits are stored: 1 for each of several greatest. 1 + vocab_size where the target's
// logit is a nan. The maximum is the lowest of equals.
enum RankTerm { kRankMetric, kArgmaxMetric, kRankTerms };

// a, b, k of (1), and s of the maximum. As a tensor, `row_coefficients`: [n_rows, kRowCoefficients + n_ids], in this
// order, and then s of the ids.
template <class Real>
struct RowCoefficients {
  Real probability;  // a
  Real entropy;      // b
  Real constant;     // k
  // s of log p_i*, for a caller who does not name i* among his ids; beside weights of the columns their factor: every
  // column j has s_j = maximum q_j. (a then lacks what q_i* gives, which the gradient at i* would cancel with.)
  Real maximum;
};
constexpr int kRowCoefficients = 4;

// s of the maximum, or the coefficient of p_j outside a tail, is about 1 / R or S / T where the row is sure. Times the row's
// weight, the gradient from above and 1 / temperature it may leave the type, and infinity times p_j = 0 is a nan. So it is
// bounded: the penalty fades, as it does where R is below smallest_rest.
template <class Real>
AVA_HOST_DEVICE Real bounded_coefficient(Real s, Real temperature) {
  const Real most = (sizeof(Real) == 4 ? Real(2e38) : Real(1e308)) * (temperature < 1 ? temperature : Real(1));
  return s > most ? most : s < -most ? -most : s;  // a nan passes
}

template <class Real>
AVA_HOST_DEVICE Real log_total(const RowStatistics<Real>& row) {
  return log1p_of(row.rest);
}
// 1 - p_c, for a column with this p_c
template <class Real>
AVA_HOST_DEVICE Real complement(const RowStatistics<Real>& row, bool is_argmax, Real probability) {
  return is_argmax ? row.rest / (1 + row.rest) : 1 - probability;
}

// log1p(odds), odds >= 0. The series of float: relative error below 5e-10 for odds <= 1/16, which most candidates have, at
// a third of the time.
AVA_HOST_DEVICE double log1p_of_odds(double odds) { return log1p(odds); }
AVA_HOST_DEVICE float log1p_of_odds(float odds) {
  if (!(odds <= 0.0625f)) return log1pf(odds);
  float series = 1.f / 7;
  for (int power = 6; power >= 1; --power) series = 1.f / float(power) - series * odds;
  return odds * series;
}

// A candidate's penalty -w log(1 - p_c) = w log1p(odds), and its s_c = w odds, with the odds p_c / (1 - p_c), of the
// maximum 1 / R.
template <class Real>
struct CandidateShare {
  Real loss, log_prob_coefficient;
};
template <class Real>
AVA_HOST_DEVICE CandidateShare<Real> unlikelihood(const RowStatistics<Real>& row, bool is_argmax, Real probability,
                                                  Real weight) {
  const Real rest = row.rest < smallest_rest<Real>() ? smallest_rest<Real>() : row.rest;  // a nan passes
  const Real odds = (is_argmax ? Real(1) : probability) / (is_argmax ? rest : 1 - probability);
  return {weight * log1p_of_odds(odds), weight * odds};
}

// A soft target's term -q log p_c, and its s_c. A masked column's is inf, as a target's is.
template <class Real>
AVA_HOST_DEVICE CandidateShare<Real> soft_target(Real total, Real u, Real weight) {  // total: log_total of the row
  return {weight * (total - u), -weight};
}

// The tail of soft targets: one more target, of weight q', for all columns but theirs. Its term is -q' log(T / S) with T
// the sum of e^u over those columns themselves: S minus that of the others would cancel. Its gradient,
//
//   dz_j = q' p_j - 1(j is not named) q' p_j S / T
//
// cannot be that of many s_c where T is small: they would be huge, and cancel. So a column that is not named has a
// coefficient of p_j of its own, beside `a`; in the tensor row_coefficients it has the place of kTailId.
template <class Real>
struct TailShare {
  Real loss, probability, outside;  // and the coefficients of p_j: of every column, and of those that are not named
};
template <class Real>
AVA_HOST_DEVICE TailShare<Real> tail_share(const RowStatistics<Real>& row, Real mass, Real weight) {  // mass: T
  const Real total = 1 + row.rest, smallest = smallest_rest<Real>() * total;
  const Real ratio = total / (mass < smallest ? smallest : mass);  // a nan passes
  return {weight * log_of(ratio), weight, -weight * ratio};
}

// Every term of one counted row but the candidates', and the coefficients of its gradient.
template <class Real>
struct RowEvaluation {
  Real terms[kRowTerms];
  RowCoefficients<Real> coefficients;
  Real target_coefficient;  // s of the target
};

// What weighs the uniform part of the loss: e, and e V / (V - 1) where the target is left out of it.
template <class Real>
AVA_HOST_DEVICE Real smoothing_of(const RowStatistics<Real>& row, const RowOptions<Real>& options, int64_t flags) {
  const Real smoothing = flags & kLabelSmoothing ? options.label_smoothing : Real(0);
  if (!(flags & kExcludeTarget)) return smoothing;
  // V = 1: no others, and R is 0, or a nan that has to stay one
  return smoothing * (row.count > 1 ? row.count / (row.count - 1) : row.rest);
}
template <class Real>
AVA_HOST_DEVICE RowEvaluation<Real> evaluate(const RowStatistics<Real>& row, const RowOptions<Real>& options,
                                             int64_t flags, bool target_is_argmax,
                                             Real target_u,  // u of the target; -inf where its column is masked
                                             Real target_weight = 1) {  // of its term, 0 beside kTargetProbabilities
  RowEvaluation<Real> out{};
  const Real total = log_total(row), mean_u = row.weighted / (1 + row.rest);
  const Real log_count = flags & (kEaft | kConfidencePenalty) ? log_of_count(row.count) : Real(0);
  const Real nll = target_is_argmax ? total : total - target_u;
  out.terms[kCrossEntropyMetric] = nll;
  out.terms[kEntropyMetric] = total - mean_u;
  out.terms[kCorrectMetric] = target_is_argmax ? Real(1) : Real(0);

  if (flags & kCrossEntropy) {
    Real weight = target_weight;
    if (flags & (kDft | kEaft) && options.reweighting_exponent != 0) {
      if (flags & kEaft)
        weight *= row.count > 1 ? power_of((total - mean_u) / log_count, options.reweighting_exponent) : row.rest;
      else
        weight *= exp_of(options.reweighting_exponent * -nll);
    }
    Real hard = nll, slope = 1;  // of the target's term, and its derivative by nll
    if (flags & kFocal) {
      // alpha o^gamma nll with o = 1 - p_t; its derivative alpha o^gamma (1 + gamma p_t nll / o) has no o^(gamma - 1)
      // p_t <= 1/2 where the target is not the maximum, so that 1 - p_t does not cancel
      const Real other = target_is_argmax ? row.rest / (1 + row.rest) : 1 - exp_of(-nll), p = 1 - other;
      const Real modulation = options.focal_alpha * power_of(other, options.focal_gamma);
      const Real ratio = nll < Real(1e-6) ? Real(1) : nll / other;
      hard = modulation * nll;
      slope = modulation * (1 + (p == 0 ? Real(0) : options.focal_gamma * p * ratio));  // p = 0: nll may be inf
    }
    if (weight != 1) {
      hard = weight == 0 ? Real(0) : weight * hard;  // a masked target's nll is inf
      slope *= weight;
    }
    const Real smoothing = smoothing_of(row, options, flags);
    out.terms[kMainLoss] = smoothing == 1 ? Real(0) : (1 - smoothing) * hard;
    out.target_coefficient = -(1 - smoothing) * slope;
    if (smoothing != 0 && !(flags & kSmoothingWeights)) {  // 0: U may be -inf
      const Real of_column = smoothing / row.count;
      out.terms[kMainLoss] += smoothing * total - of_column * row.sum;
      out.coefficients.probability += smoothing;
      out.coefficients.constant = -of_column;
    }
  }
  if (flags & kZLoss) {
    const Real lse = row.max / options.temperature + total;
    out.terms[kZLossTerm] = options.z_loss_weight * lse * lse;
    out.coefficients.probability += 2 * options.z_loss_weight * lse;
  }
  if (flags & kConfidencePenalty) {
    if (row.count > 1) {
      const Real slope = options.confidence_penalty_weight / log_count;
      out.terms[kConfidencePenaltyTerm] = options.confidence_penalty_weight - slope * (total - mean_u);
      out.coefficients.entropy = slope;
    } else {
      out.terms[kConfidencePenaltyTerm] = out.coefficients.entropy = row.rest;  // 0, or a nan
    }
  }
  return out;
}

// Sums over the weights q_j of the columns. u_i* is 0, so that i* has no part in `weighted`. A masked column has none in
// any, except that its probability above 0 makes the loss infinite.
template <class Real>
struct ColumnWeightSums {
  Real rest;        // sum over j != i* of q_j
  Real at_maximum;  // q_i*
  Real weighted;    // sum of q_j u_j
};

// What the weights of the columns add to the terms of a row, and to its coefficients.
template <class Real>
AVA_HOST_DEVICE void add_column_weights(const RowStatistics<Real>& row, const RowOptions<Real>& options, int64_t flags,
                                        const ColumnWeightSums<Real>& q, RowEvaluation<Real>& out) {
  const Real loss = (q.rest + q.at_maximum) * log_total(row) - q.weighted,
             smoothing = smoothing_of(row, options, flags);
  const Real factor = flags & kTargetProbabilities ? 1 - smoothing : smoothing / row.count;
  if (flags & kTargetProbabilities) out.terms[kCrossEntropyMetric] = loss;
  if (!(flags & kCrossEntropy)) return;
  if (factor != 0) out.terms[kMainLoss] += factor * loss;  // the loss may be infinite
  out.coefficients.probability += factor * q.rest;
  out.coefficients.maximum = -factor;
}

// (1) for the columns that are nobody's target or candidate, as a function of d = softcap(x) - max, already by x but
// for the soft cap:
//   dx = e^{d / T} (factor + slope d) + constant
//
// where e^{d / T} is 0 a kernel bounds d from below, by lowest_u T: slope d may be infinite.
template <class Real>
struct DenseGradient {
  Real factor, slope, constant;
};
template <class Real>
AVA_HOST_DEVICE DenseGradient<Real> dense_gradient(
    const RowStatistics<Real>& row, const RowCoefficients<Real>& coefficients,
    Real log_prob_coefficients,  // sum of s_c over all columns, i* included
    Real inverse_temperature) {
  const Real inverse_total = 1 / (1 + row.rest), mean_u = row.weighted * inverse_total,
             by_x = inverse_temperature * inverse_total;
  return {(coefficients.probability - log_prob_coefficients - coefficients.entropy * mean_u) * by_x,
          coefficients.entropy * inverse_temperature * by_x, coefficients.constant * inverse_temperature};
}

// (1) at a column that has an s_c, by z.
template <class Real>
AVA_HOST_DEVICE Real sparse_gradient(const RowStatistics<Real>& row, const RowCoefficients<Real>& coefficients,
                                     bool is_argmax, Real u, Real probability,
                                     Real own,       // s_c of this column
                                     Real others) {  // sum of s over the other columns
  const Real mean_u = row.weighted / (1 + row.rest);
  if (u < lowest_u<Real>()) u = lowest_u<Real>();  // its probability is 0, which an infinite product would hide
  return probability * (coefficients.probability - others + coefficients.entropy * (u - mean_u)) +
         coefficients.constant + own * complement(row, is_argmax, probability);
}

}  // namespace AVA_ISA
}  // namespace ava
