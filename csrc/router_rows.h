// The mathematics of a router's rows, shared by every kernel and by the C++ tests. Free of torch.
//
// A row holds one token's logits z_e for n_experts experts. Its scores are softmax(z), or normalised sigmoids
// sigmoid(z_e) / sum sigmoid(z). The second is the softmax of log sigmoid(z), so with effective logits
//
//   y = z  (softmax)     or     y = log sigmoid(z) = min(z, 0) - log1p(e^-|z|),  dy/dz = sigmoid(-z)  (sigmoid)
//
// both are p_e = e^{u_e} / (1 + R),  u_e = y_e - max y,  R = sum of e^{u_e} without the maximum itself, so that nothing
// underflows altogether and 1 - p_max = R / (1 + R) stays exact where the router is sure. With B = sum u_e e^{u_e}:
//
//   lse = log sum e^{z_e} (of z, also for sigmoid scores)     H = log1p(R) - B / (1 + R)  (entropy)
//
// The statistics of a group (one layer, or one segment of one) are sums over the rows that count, one vector of experts
// or one scalar each: all that balancing losses ask for.
//
//   c_e = number of choices of e     P_e = sum p_e     I_e = sum p_e m_e,  m_e = how often the row chose e
//   Z = sum lse^2     S = sum H     n = number of rows
//
// Sums add, so parts of a group merge in any cut. Kernels fix the cut and the order (blocks of rows that depend on the
// group alone, not on threads), which makes them repeatable bit by bit. Within a block at most kRowsInFloat rows are
// added in float, then in double: the error of a sum stays below 1e-6 however many rows there are.
//
// Gradient, for any losses on top. With upstream gradients a_e of P_e, b_e of I_e, zeta of Z, eta of S, and
// v_e = a_e + m_e b_e:
//
//   d/dy_j = p_j [ (v_j - w) - sum_e p_e (v_e - w) - eta (u_j - B / (1 + R)) ]          for any w                   (1)
//   d/dz_j = d/dy_j dy_j/dz_j + 2 zeta lse softmax(z)_j
//
// w takes out what all experts have in common, which would cancel: the mean of a for the group; and where a row is sure,
// v of its maximum, whose own entry then is -p sum_{others} p_e (v_e - w), exact however small the others are.
#pragma once
#include "scalar_math.h"

namespace ava {
inline namespace AVA_ISA {

constexpr int64_t kRowsInFloat = 64;

// R below this is summed again without the maximum: 1 + R has lost digits of it.
template <class Real>
constexpr Real kSureRest = Real(0.125);

template <class Real>
struct RouterRow {
  Real max;       // of y
  Real rest;      // R
  Real weighted;  // B
};

template <class Real>
AVA_HOST_DEVICE Real log_sigmoid(Real z) {
  return (z > 0 ? Real(0) : z) - log1p_of(exp_of(z < 0 ? z : -z));  // a nan stays one
}
// its derivative, sigmoid(-z)
template <class Real>
AVA_HOST_DEVICE Real log_sigmoid_slope(Real z) {
  const Real small = exp_of(z < 0 ? z : -z);
  return (z < 0 ? Real(1) : small) / (1 + small);
}

// log(1 + rest) for rest >= 0, also for tiny rest; a nan stays one. Written so that a compiler makes vectors of a loop
// over it. Float: log of the mantissa in [sqrt 1/2, sqrt 2) by 2 atanh(s), s = (m - 1) / (m + 1), to s^9 (relative error
// below 2e-7), and what rounding 1 + rest took away to first order.
AVA_HOST_DEVICE double log1p_of_rest(double rest) { return log1p(rest); }
AVA_HOST_DEVICE float log1p_of_rest(float rest) {
  const float total = 1.f + rest;
  const uint32_t shifted = float_to_bits(total) - 0x3f3504f3u;  // sqrt(1/2)
  const float exponent = float(int32_t(shifted) >> 23), m = bits_to_float((shifted & 0x7fffffu) + 0x3f3504f3u);
  const float s = (m - 1.f) / (m + 1.f), square = s * s;
  const float series = (((square * (1.f / 9) + 1.f / 7) * square + 1.f / 5) * square + 1.f / 3) * square;
  return exponent * 0.693147180559945f + ((2.f * s) * series + (2.f * s)) + (rest - (total - 1.f)) / total;
}

template <class Real>
AVA_HOST_DEVICE Real entropy(const RouterRow<Real>& row) {
  return log1p_of_rest(row.rest) - row.weighted / (1 + row.rest);
}

// Whether an expert is chosen before another: the larger score, of equals the lower index; nan counts as the largest, as
// in torch.topk.
template <class Real>
AVA_HOST_DEVICE bool ranks_before(Real score, int64_t expert, Real other_score, int64_t other) {
  const bool is_nan = score != score, other_is_nan = other_score != other_score;
  if (is_nan != other_is_nan) return is_nan;
  if (!is_nan && score != other_score) return score > other_score;
  return expert < other;
}

// The same order as one number: a larger rank goes first, of equals the lower index. Above INT32_MIN.
AVA_HOST_DEVICE int32_t rank_of(float score) {
  const int32_t bits = int32_t(float_to_bits(score + 0.f));  // -0 is 0
  return score != score ? INT32_MAX : bits ^ (bits >> 31 & INT32_MAX);
}

// The k best of n_experts scores, best first; k <= n_experts.
template <class Real, class ScoreOf>
AVA_HOST_DEVICE void choose(int64_t n_experts, int64_t k, ScoreOf score_of, int32_t* chosen) {
  for (int64_t slot = 0; slot < k; ++slot) {
    int64_t best = -1;
    for (int64_t e = 0; e < n_experts; ++e) {
      const bool is_left =
          slot == 0 || ranks_before(Real(score_of(chosen[slot - 1])), chosen[slot - 1], Real(score_of(e)), e);
      if (is_left && (best < 0 || ranks_before(Real(score_of(e)), e, Real(score_of(best)), best))) best = e;
    }
    chosen[slot] = int32_t(best);
  }
}

// A row's own choices are kept as bits: expert e is bit e % 8 of byte e / 8.
AVA_HOST_DEVICE int64_t bytes_of_choice(int64_t n_experts) { return (n_experts + 7) / 8; }
AVA_HOST_DEVICE bool is_chosen(const uint8_t* choice, uint64_t expert) { return choice[expert / 8] >> expert % 8 & 1; }
AVA_HOST_DEVICE void set_chosen(uint8_t* choice, uint64_t expert) { choice[expert / 8] |= uint8_t(1 << expert % 8); }

// (1) at one expert.
template <class Real>
AVA_HOST_DEVICE Real effective_gradient(const RouterRow<Real>& row, Real u,
                                        Real centred,  // v_j - w
                                        Real mean,     // sum_e p_e (v_e - w)
                                        Real grad_entropy) {
  const Real total = 1 + row.rest;
  return exp_of(u) / total * ((centred - mean) - grad_entropy * (u - row.weighted / total));
}

}  // namespace AVA_ISA
}  // namespace ava
