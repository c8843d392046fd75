// The row maths by themselves, in float and in double, against sums taken column by column in long double.
#include "softmax_rows.h"

#include <algorithm>
#include <random>
#include <vector>

#include "expect.h"

template <class Real>
constexpr double tolerance() {
  return sizeof(Real) == 4 ? 2e-6 : 1e-13;
}

template <class Real>
static ava::RowStatistics<Real> measure(const std::vector<Real>& row, size_t begin, size_t end,
                                        Real inverse_temperature) {
  ava::RowStatistics<Real> statistics = ava::empty_statistics<Real>();
  for (size_t i = begin; i < end; ++i) statistics = ava::update(statistics, row[i], int64_t(i), inverse_temperature);
  return statistics;
}

template <class Real>
static void expect_statistics(const ava::RowStatistics<Real>& got, const std::vector<Real>& row,
                              Real inverse_temperature) {
  size_t argmax = 0;
  for (size_t i = 0; i < row.size(); ++i)
    if (row[i] > row[argmax]) argmax = i;
  long double rest = 0, weighted = 0, sum = 0, count = 0;
  for (size_t i = 0; i < row.size(); ++i) {
    if (row[i] == -INFINITY) continue;
    const long double u = (static_cast<long double>(row[i]) - row[argmax]) * inverse_temperature;
    if (i != argmax) rest += std::exp(u);
    weighted += u * std::exp(u), sum += u, count += 1;
  }
  EXPECT(got.max == row[argmax]);
  EXPECT(got.argmax == Real(argmax));
  EXPECT_CLOSE(got.rest, double(rest), 8 * tolerance<Real>());
  EXPECT_CLOSE(got.weighted, double(weighted), 8 * tolerance<Real>());
  EXPECT_CLOSE(got.sum, double(sum), 8 * tolerance<Real>());
  EXPECT(got.count == Real(count));
}

template <class Real>
static std::vector<Real> random_row(std::mt19937& engine, size_t size, Real scale) {
  std::vector<Real> row(size);
  std::normal_distribution<Real> normal(0, scale);
  // of equal maxima, in any part, the first one counts
  for (Real& value : row) value = engine() % 5 == 0 ? -Real(INFINITY) : std::min(normal(engine), Real(2));
  row[engine() % size] = 2;  // never masked altogether
  return row;
}

template <class Real>
static void test_statistics_and_merge() {
  std::mt19937 engine(1);
  for (const size_t size : {1, 2, 7, 100}) {
    for (int repetition = 0; repetition < 50; ++repetition) {
      const Real inverse_temperature = repetition % 2 ? Real(1) : Real(0.4);
      const std::vector<Real> row = random_row<Real>(engine, size, Real(4));
      expect_statistics(measure(row, 0, size, inverse_temperature), row, inverse_temperature);
      const size_t first_cut = engine() % (size + 1), second_cut = first_cut + engine() % (size + 1 - first_cut);
      const auto a = measure(row, 0, first_cut, inverse_temperature),
                 b = measure(row, first_cut, second_cut, inverse_temperature),
                 c = measure(row, second_cut, size, inverse_temperature);
      using ava::merge;
      expect_statistics(merge(merge(a, b, inverse_temperature), c, inverse_temperature), row, inverse_temperature);
      expect_statistics(merge(a, merge(b, c, inverse_temperature), inverse_temperature), row, inverse_temperature);
      expect_statistics(merge(merge(c, a, inverse_temperature), b, inverse_temperature), row, inverse_temperature);
    }
  }
}

template <class Real>
static void test_empty_parts_and_nan() {
  const Real infinity = Real(INFINITY), nan = Real(NAN);
  const auto empty = ava::empty_statistics<Real>();
  const auto both_empty = ava::merge(empty, empty, Real(1));
  EXPECT(both_empty.max == -infinity && both_empty.argmax == -1 && both_empty.rest == 0 && both_empty.count == 0);
  const auto one = ava::update(empty, Real(-3), 4, Real(1));
  EXPECT(one.max == -3 && one.argmax == 4 && one.rest == 0 && one.weighted == 0 && one.sum == 0 && one.count == 1);
  for (const auto& merged : {ava::merge(one, empty, Real(1)), ava::merge(empty, one, Real(1))})
    EXPECT(merged.max == -3 && merged.argmax == 4 && merged.rest == 0 && merged.count == 1);
  EXPECT(ava::update(one, -infinity, 5, Real(1)).count == 1);
  EXPECT(ava::update(one, nan, 5, Real(1)).max == -3);
  const auto measured = [](const std::vector<Real>& part) { return measure(part, 0, part.size(), Real(1)); };
  using Parts = std::vector<std::vector<Real>>;
  for (const auto& sick : Parts{{nan}, {1, nan}, {nan, -infinity}})
    for (const auto& other : Parts{{}, {2}, {-infinity}, {nan}}) {
      EXPECT(std::isnan(ava::merge(measured(sick), measured(other), Real(1)).rest));
      EXPECT(std::isnan(ava::merge(measured(other), measured(sick), Real(1)).rest));
    }
}

// dz by central differences of the terms themselves, in the same header: a derivative that does not fit its term shows
static void test_gradient_by_differences() {
  const std::vector<double> z = {0.3, -1.2, 2.1, 0.9, -0.4};
  const ava::RowOptions<double> options{1, 0.2, 0.5, 1.5, 0.3, 0.7, 0, 1};
  const std::vector<std::pair<int64_t, double>> candidates = {{2, 0.6}, {4, 1.1}, {0, 0.9}};
  constexpr int64_t target = 1;
  const auto total = [&](const std::vector<double>& values, int64_t flags, std::vector<double>* gradient) {
    const auto row = measure(values, 0, values.size(), 1.0);
    const auto u = [&](int64_t column) { return values[column] - row.max; };
    const auto is_argmax = [&](int64_t column) { return double(column) == row.argmax; };
    const auto evaluation = ava::evaluate(row, options, flags, is_argmax(target), u(target));
    double loss = evaluation.terms[ava::kMainLoss] + evaluation.terms[ava::kZLossTerm] +
                  evaluation.terms[ava::kConfidencePenaltyTerm];
    std::vector<double> own(values.size(), 0);
    own[target] = evaluation.target_coefficient;
    double sum_of_own = own[target];
    for (const auto& [column, weight] : candidates) {
      const auto share = ava::unlikelihood(row, is_argmax(column), std::exp(u(column)) / (1 + row.rest), weight);
      loss += share.loss, own[column] += share.log_prob_coefficient, sum_of_own += share.log_prob_coefficient;
    }
    if (!gradient) return loss;
    const auto dense = ava::dense_gradient(row, evaluation.coefficients, sum_of_own, 1.0);
    for (size_t j = 0; j < values.size(); ++j)
      (*gradient)[j] = own[j] == 0 ? std::exp(u(j)) * (dense.factor + dense.slope * u(j)) + dense.constant
                                   : ava::sparse_gradient(row, evaluation.coefficients, is_argmax(j), u(j),
                                                          std::exp(u(j)) / (1 + row.rest), own[j], sum_of_own - own[j]);
    return loss;
  };
  for (const int64_t flags : {0, 1, 3, 5, 7, 13, 15, 16, 32, 63}) {
    std::vector<double> gradient(z.size());
    total(z, flags, &gradient);
    for (size_t j = 0; j < z.size(); ++j) {
      std::vector<double> above = z, below = z;
      above[j] += 1e-5, below[j] -= 1e-5;
      const double difference = (total(above, flags, nullptr) - total(below, flags, nullptr)) / 2e-5;
      EXPECT(std::fabs(gradient[j] - difference) < 1e-8);
    }
  }
}

// The tail of soft targets on columns 0 and 1 of four: the term by its definition, and the coefficients of p_j by
// central differences of the term, in the columns of the tail and in the others. Without a tail, a finite term.
template <class Real>
static void test_tail(double largest_gap) {
  const double weight = 0.3;
  for (double gap = 0.5; gap <= largest_gap; gap *= 1.5) {
    const auto log_tail = [&](const std::vector<double>& z) {
      const double others = std::log(std::exp(z[2]) + std::exp(z[3]));
      const double named = std::log(1 + std::exp(z[1] - z[0])) + z[0];
      return -std::log1p(std::exp(named - others));
    };
    const std::vector<double> z = {gap, gap - 1, 0, -1};
    const std::vector<Real> row(z.begin(), z.end());
    const auto statistics = measure(row, 0, row.size(), Real(1));
    const Real mass = std::exp(row[2] - row[0]) + std::exp(row[3] - row[0]);
    const auto share = ava::tail_share(statistics, mass, Real(weight));
    const double relative = tolerance<Real>() * (1 + gap / 16);
    EXPECT_CLOSE(share.loss, -weight * log_tail(z), relative);
    for (size_t j = 0; j < z.size(); ++j) {
      const double u = double(row[j]) - double(row[0]), p = std::exp(u) / (1 + double(statistics.rest));
      const double got = p * (double(share.probability) + (j >= 2 ? double(share.outside) : 0));
      std::vector<double> above = z, below = z;
      above[j] += 1e-5, below[j] -= 1e-5;
      const double difference = -weight * (log_tail(above) - log_tail(below)) / 2e-5;
      EXPECT(std::fabs(got - difference) < 1e-6);
    }
  }
  const auto nothing = ava::tail_share(measure(std::vector<Real>{1, 2}, 0, 2, Real(1)), Real(0), Real(weight));
  EXPECT(std::isfinite(nothing.loss) && std::isfinite(nothing.outside) && nothing.loss > 20);
}

// The maximum is the candidate: -w log(1 - p) = w (gap - log of the others' sum), and dz_max = w / S, however large the gap.
template <class Real>
static void test_sure_candidate(double largest_gap) {
  for (double gap = 1; gap <= largest_gap; gap *= 1.5) {
    const std::vector<Real> row = {0, Real(gap), -1, -2};
    const auto statistics = measure(row, 0, row.size(), Real(1));
    const auto share = ava::unlikelihood(statistics, true, Real(1) / (1 + statistics.rest), Real(3));
    const double rest = (1 + std::exp(-1.0) + std::exp(-2.0)) * std::exp(-double(row[1]));
    const double relative = tolerance<Real>() * (1 + gap / 16);
    EXPECT_CLOSE(share.loss, 3 * std::log1p(1 / rest), relative);
    const auto gradient = ava::sparse_gradient(statistics, {}, true, Real(0), 1 / (1 + statistics.rest),
                                               share.log_prob_coefficient, Real(0));
    EXPECT_CLOSE(gradient, 3 / (1 + rest), relative);
    const auto dense = ava::dense_gradient(statistics, {}, share.log_prob_coefficient, Real(1));
    EXPECT_CLOSE(ava::exp_of(row[0] - row[1]) * dense.factor, -3 * std::exp(-double(row[1])) / rest / (1 + rest),
                 relative);
  }
}

// -log(1 - p) = log1p(odds), not the difference of two logarithms.
template <class Real>
static void test_log1p_of_odds() {
  for (double odds = 1e-30; odds < 1e7; odds *= 1.01)
    EXPECT_CLOSE(ava::log1p_of_odds(Real(odds)), std::log1p(double(Real(odds))), tolerance<Real>() / 10);
  const auto row = measure(std::vector<Real>(3000, 0), 0, 3000, Real(1));
  const auto share = ava::unlikelihood(row, true, Real(1) / 3000, Real(1));
  EXPECT_CLOSE(share.loss, std::log1p(1. / 2999), tolerance<Real>() / 10);
}

template <class Real>
static void test_rows_of_one_column() {
  const auto row = measure(std::vector<Real>{5}, 0, 1, Real(1));
  const auto evaluation = ava::evaluate(row, ava::RowOptions<Real>{1, Real(0.1), 1, 2, 1, 1, 0, 1}, 63, true, Real(0));
  EXPECT(evaluation.terms[ava::kMainLoss] == 0 && evaluation.terms[ava::kConfidencePenaltyTerm] == 0);
  EXPECT(evaluation.terms[ava::kZLossTerm] == 25);
  const auto share = ava::unlikelihood(row, true, Real(1), Real(30));
  EXPECT(std::isfinite(share.loss) && std::isfinite(share.log_prob_coefficient));
  const Real from_above = share.log_prob_coefficient * Real(1e9), cold = Real(0.01);
  const Real bounded = ava::bounded_coefficient(from_above, cold);
  const auto dense = ava::dense_gradient(row, {}, bounded, 1 / cold);
  EXPECT(bounded > 0 && std::isfinite(dense.factor) && dense.factor < 0);
  EXPECT(ava::bounded_coefficient(-from_above, cold) == -bounded);
  EXPECT(std::isnan(ava::bounded_coefficient(Real(NAN), cold)));
}

// Every 16-bit value is what its bits say, and comes back as it went. What lies between two goes to the nearer one, a tie
// to the even one.
template <class Element>
static void test_elements_of_16_bits(int mantissa_bits, int bias) {
  const auto widened = [](uint32_t bits) { return ava::widen(Element{uint16_t(bits)}); };
  const auto narrowed = [](float value) {
    Element element;
    ava::narrow(value, &element);
    return element.bits;
  };
  const uint32_t infinity = 0x8000u - (1u << mantissa_bits);
  for (uint32_t bits = 0; bits < 0x8000u; ++bits) {
    const uint32_t negative = bits | 0x8000u;
    const float value = widened(bits);
    if (bits > infinity) {
      EXPECT(std::isnan(value) && std::isnan(widened(narrowed(value))) && std::isnan(widened(negative)));
      continue;
    }
    const int exponent = int(bits >> mantissa_bits), mantissa = int(bits & ((1u << mantissa_bits) - 1));
    const double exact = exponent == 0 ? std::ldexp(mantissa, 1 - bias - mantissa_bits)
                                       : std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
    EXPECT(bits == infinity ? std::isinf(value) : value == float(exact));
    EXPECT(widened(negative) == -value && narrowed(value) == bits && narrowed(-value) == negative);
    if (bits == infinity) continue;
    const float step = bits + 1 < infinity ? widened(bits + 1) - value : value - widened(bits - 1);
    const float tie = value + step / 2;
    EXPECT(narrowed(tie) == bits + bits % 2 && narrowed(-tie) == negative + bits % 2);
    EXPECT(narrowed(std::nextafter(tie, 0.f)) == bits && narrowed(std::nextafter(tie, INFINITY)) == bits + 1);
  }
  EXPECT(std::isnan(widened(narrowed(ava::bits_to_float(0x7f800001u)))));  // whose upper half looks like infinity
}

template <class Real>
static void test_all(double largest_gap) {
  test_statistics_and_merge<Real>();
  test_empty_parts_and_nan<Real>();
  test_sure_candidate<Real>(largest_gap);
  test_log1p_of_odds<Real>();
  test_rows_of_one_column<Real>();
}

int main() {
  test_all<float>(80);
  test_all<double>(600);
  test_gradient_by_differences();
  test_tail<float>(80);
  test_tail<double>(600);
  test_elements_of_16_bits<ava::BFloat16>(7, 127);
  test_elements_of_16_bits<ava::Float16>(10, 15);
  return expect::exit_code();
}
