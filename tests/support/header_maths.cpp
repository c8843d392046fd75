// Lets Python tests call the torch-free headers directly: numbers in, numbers out. Built by tests/conftest.py, never
// installed.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../../csrc/softmax_rows.h"

namespace py = pybind11;

namespace {

template <class Real>
using Statistics = std::tuple<Real, Real, Real, Real, Real, Real>;  // in the order of RowStatistics

template <class Real>
Statistics<Real> to_tuple(const ava::RowStatistics<Real>& row) {
  return {row.max, row.argmax, row.rest, row.weighted, row.sum, row.count};
}
template <class Real>
ava::RowStatistics<Real> from_tuple(const Statistics<Real>& row) {
  const auto [max, argmax, rest, weighted, sum, count] = row;
  return {max, argmax, rest, weighted, sum, count};
}

template <class Real>
Statistics<Real> measure(const std::vector<Real>& values, int64_t first_column, Real inverse_temperature) {
  ava::RowStatistics<Real> row = ava::empty_statistics<Real>();
  for (size_t i = 0; i < values.size(); ++i)
    row = ava::update(row, values[i], first_column + int64_t(i), inverse_temperature);
  return to_tuple(row);
}

// terms, and the gradient by z of every column, of which some have an s_c
template <class Real>
std::pair<std::vector<Real>, std::vector<Real>> evaluate_and_differentiate(
    const Statistics<Real>& statistics, const std::vector<Real>& z, const std::vector<Real>& options, int64_t flags,
    int64_t target, const std::vector<std::pair<int64_t, Real>>& candidates) {
  const ava::RowStatistics<Real> row = from_tuple<Real>(statistics);
  const ava::RowOptions<Real> row_options{options[0], options[1], options[2], options[3],
                                          options[4], options[5], options[6], options[7]};
  const auto u_of = [&](int64_t column) { return z[column] - row.max; };  // temperature 1
  const auto is_argmax = [&](int64_t column) { return column == int64_t(row.argmax); };
  const auto evaluation = ava::evaluate(row, row_options, flags, is_argmax(target), u_of(target));
  std::vector<Real> terms(evaluation.terms, evaluation.terms + ava::kRowTerms), own(z.size(), 0);
  own[target] = evaluation.target_coefficient;
  Real penalty = 0;
  for (const auto& [column, weight] : candidates) {
    const Real probability = ava::exp_of(u_of(column)) / (1 + row.rest);
    const auto share = ava::unlikelihood(row, is_argmax(column), probability, weight);
    penalty += share.loss;
    own[column] += share.log_prob_coefficient;
  }
  terms.push_back(penalty);

  Real sum_of_own = 0;
  for (const Real s : own) sum_of_own += s;
  const auto dense = ava::dense_gradient(row, evaluation.coefficients, sum_of_own, Real(1));
  std::vector<Real> gradient(z.size());
  for (int64_t column = 0; column < int64_t(z.size()); ++column) {
    const Real u = u_of(column), e = ava::exp_of(u);
    gradient[column] = e * (dense.factor + dense.slope * u) + dense.constant;
    if (own[column] == 0) continue;
    Real others = 0;
    for (int64_t c = 0; c < int64_t(z.size()); ++c)
      if (c != column) others += own[c];
    gradient[column] = ava::sparse_gradient(row, evaluation.coefficients, is_argmax(column), u, e / (1 + row.rest),
                                            own[column], others);
  }
  return {terms, gradient};
}

template <class Real>
void define_row_maths(py::module_& m, const std::string& suffix) {
  m.def(("measure_" + suffix).c_str(), &measure<Real>);
  m.def(("merge_" + suffix).c_str(), [](const Statistics<Real>& first, const Statistics<Real>& second, Real inverse) {
    return to_tuple(ava::merge(from_tuple<Real>(first), from_tuple<Real>(second), inverse));
  });
  m.def(("evaluate_" + suffix).c_str(), &evaluate_and_differentiate<Real>);
}

template <class Element>
uint16_t bits_of_narrowed(uint32_t float_bits) {
  Element element;
  ava::narrow(ava::bits_to_float(float_bits), &element);
  return element.bits;
}

}  // namespace

PYBIND11_MODULE(header_maths, m) {
  m.doc() = "The torch-free headers of csrc/";
  define_row_maths<float>(m, "float32");
  define_row_maths<double>(m, "float64");
  // by bits: a signalling nan would not survive the way through a Python float
  m.def("narrow_bfloat16", &bits_of_narrowed<ava::BFloat16>);
  m.def("narrow_float16", &bits_of_narrowed<ava::Float16>);
  m.def("widen_bfloat16", [](uint16_t bits) { return ava::float_to_bits(ava::widen(ava::BFloat16{bits})); });
  m.def("widen_float16", [](uint16_t bits) { return ava::float_to_bits(ava::widen(ava::Float16{bits})); });
}
