// The router maths by themselves, in float and in double, against long double and against differences.
#include "router_rows.h"

#include <algorithm>
#include <numeric>
#include <random>
#include <vector>

#include "expect.h"

template <class Real>
constexpr double tolerance() {
  return sizeof(Real) == 4 ? 3e-7 : 4e-16;
}

template <class Real>
static void test_log1p_of_rest() {
  EXPECT(ava::log1p_of_rest(Real(0)) == 0);
  for (double rest = 1e-30; rest < 1e7; rest *= 1.01)
    EXPECT_CLOSE(ava::log1p_of_rest(Real(rest)), std::log1p(double(Real(rest))), tolerance<Real>());
  EXPECT(std::isnan(ava::log1p_of_rest(Real(NAN))));
}

template <class Real>
static void test_log_sigmoid() {
  for (double z = -80; z < 80; z += 0.37) {
    const long double exact = static_cast<long double>(Real(z)), slope = 1 / (1 + std::exp(exact));
    EXPECT_CLOSE(ava::log_sigmoid(Real(z)), double(-std::log1p(std::exp(-exact))), 4 * tolerance<Real>());
    EXPECT_CLOSE(ava::log_sigmoid_slope(Real(z)), double(slope), 4 * tolerance<Real>());
  }
  EXPECT(ava::log_sigmoid(-Real(INFINITY)) == -INFINITY && ava::log_sigmoid(Real(INFINITY)) == 0);
  EXPECT(ava::log_sigmoid_slope(-Real(INFINITY)) == 1 && ava::log_sigmoid_slope(Real(INFINITY)) == 0);
  EXPECT(std::isnan(ava::log_sigmoid(Real(NAN))));
}

// against a stable sort, with equal scores, -inf and nan among them
template <class Real>
static void test_choose() {
  std::mt19937 engine(1);
  for (int repetition = 0; repetition < 300; ++repetition) {
    const int64_t n_experts = 1 + engine() % 12, k = 1 + engine() % n_experts;
    std::vector<Real> scores(n_experts);
    for (Real& score : scores)
      score = engine() % 9 == 0 ? Real(NAN) : engine() % 5 == 0 ? -Real(INFINITY) : Real(engine() % 4);
    std::vector<int32_t> expected(n_experts), chosen(k);
    std::iota(expected.begin(), expected.end(), 0);
    std::stable_sort(expected.begin(), expected.end(), [&](int32_t a, int32_t b) {
      if (std::isnan(scores[a]) || std::isnan(scores[b])) return std::isnan(scores[a]) && !std::isnan(scores[b]);
      return scores[a] > scores[b];
    });
    ava::choose<Real>(n_experts, k, [&](int64_t e) { return scores[e]; }, chosen.data());
    EXPECT(std::equal(chosen.begin(), chosen.end(), expected.begin()));
  }
}

static ava::RouterRow<double> measure(const std::vector<double>& y) {
  ava::RouterRow<double> row{*std::max_element(y.begin(), y.end()), -1, 0};
  for (const double value : y) {
    row.rest += std::exp(value - row.max);
    row.weighted += (value - row.max) * std::exp(value - row.max);
  }
  return row;
}

// the derivative of sum_e p_e v_e + eta H by central differences of the header's own entropy
static void test_gradient_by_differences() {
  const std::vector<double> y = {0.3, -1.2, 2.1, 0.9, -0.4}, v = {1.0, -2.0, 0.5, 3.0, 0.25};
  constexpr double eta = 0.7;
  const auto loss = [&](const std::vector<double>& values) {
    const auto row = measure(values);
    double sum = eta * ava::entropy(row);
    for (size_t e = 0; e < values.size(); ++e) sum += v[e] * std::exp(values[e] - row.max) / (1 + row.rest);
    return sum;
  };
  const auto row = measure(y);
  for (const double w : {0.0, 1.5}) {
    double mean = 0;
    for (size_t e = 0; e < y.size(); ++e) mean += (v[e] - w) * std::exp(y[e] - row.max) / (1 + row.rest);
    for (size_t j = 0; j < y.size(); ++j) {
      std::vector<double> above = y, below = y;
      above[j] += 1e-5, below[j] -= 1e-5;
      const double got = ava::effective_gradient(row, y[j] - row.max, v[j] - w, mean, eta);
      EXPECT(std::fabs(got - (loss(above) - loss(below)) / 2e-5) < 1e-9);
    }
  }
}

// where one expert has nearly everything: H = R (1 + gap) to first order, far below the resolution of 1 + R
template <class Real>
static void test_entropy_of_a_sure_row() {
  for (double gap = 20; gap < 80; gap *= 1.3) {
    const Real rest = Real(std::exp(-gap));
    const ava::RouterRow<Real> row{Real(3), rest, Real(-gap) * rest};
    EXPECT_CLOSE(ava::entropy(row), double(rest) * (1 + double(Real(gap))), 8 * tolerance<Real>() + std::exp(-gap));
  }
}

int main() {
  test_log1p_of_rest<float>();
  test_log1p_of_rest<double>();
  test_log_sigmoid<float>();
  test_log_sigmoid<double>();
  test_choose<float>();
  test_choose<double>();
  test_gradient_by_differences();
  test_entropy_of_a_sure_row<float>();
  test_entropy_of_a_sure_row<double>();
  return expect::exit_code();
}
