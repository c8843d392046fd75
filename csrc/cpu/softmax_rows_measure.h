// Reads one row of logits with the vector operations of one instruction set: its softmax statistics. Included by
// softmax_rows_kernels.h. The formulas are in softmax_rows.h.
//
// measure() reads the row in blocks. Each block is summed against a reference that was near the maximum when the block
// began (no pass of its own to find the maximum); only when a block's maximum is far above is it summed again. The
// sums of the block that holds the maximum are then taken again without it, against the exact maximum: that gives R. Of a
// row of one block the maximum is looked for first, and the others are summed once.
#pragma once
#include <stddef.h>

#include "../softmax_rows.h"
#include "softmax_rows_arguments.h"
#include "vector_double.h"

namespace ava {
inline namespace AVA_ISA {

// tanh: odd polynomial below 0.625 (Cephes), (1 - e^-2y) / (1 + e^-2y) above; error below 2 ulp.
template <class Vector>
inline typename Vector::Register tanh_of_vector(typename Vector::Register x) {
  using V = Vector;
  const auto y = V::abs(x), square = V::mul(x, x), one = V::set(1.f);
  auto p = V::fma(V::set(-5.70498872745e-3f), square, V::set(2.06390887954e-2f));
  p = V::fma(p, square, V::set(-5.37397155531e-2f));
  p = V::fma(p, square, V::set(1.33314422036e-1f));
  p = V::fma(p, square, V::set(-3.33332819422e-1f));
  const auto small = V::fma(V::mul(p, square), x, x);
  const auto power = V::exponential(y, V::set(-2 * 1.4426950408889634f));
  const auto large = V::copy_sign(V::div(V::sub(one, power), V::add(one, power)), x);
  return V::select(V::less(y, V::set(0.625f)), small, large);
}
template <>
inline double tanh_of_vector<VectorDouble>(double x) {
  return tanh_of(x);
}

template <class Vector, class Element, bool kDense, bool kCapped>
struct RowReader {
  using V = Vector;
  using Real = typename Vector::Value;
  using Register = typename Vector::Register;
  static constexpr int kLanes = Vector::kLanes;
  static constexpr int64_t kBlock = 64 * kLanes;
  static constexpr bool kIsDouble = sizeof(Real) == 8;

  const SoftmaxRowsArguments& arguments;
  const RowOptions<Real> options;
  const Real inverse_temperature = 1 / options.temperature;
  // what the float vectors' exponential wants: log2(e) / T
  const Real factor = kIsDouble ? inverse_temperature : Real(1.4426950408889634) * inverse_temperature;

  explicit RowReader(const SoftmaxRowsArguments& all)
      : arguments(all), options(*static_cast<const RowOptions<Real>*>(all.options)) {}

  [[gnu::always_inline]] Register exponential(Register d) const { return V::exponential(d, V::set(factor)); }

  // softcap(x), and its derivative; a raw -inf stays -inf, with derivative 0
  struct Capped {
    Register value, slope;
  };
  Capped capped(Register x) const {
    const auto present = V::not_equal(x, V::set(-Real(INFINITY)));
    const Register t = tanh_of_vector<Vector>(V::mul(x, V::set(1 / options.softcap)));
    return {V::select(present, V::mul(V::set(options.softcap), t), V::set(-Real(INFINITY))),
            V::keep(present, V::sub(V::set(Real(1)), V::mul(t, t)))};
  }
  Register effective(Register x) const {
    if constexpr (kCapped)
      return capped(x).value;
    else
      return x;
  }
  Real effective_at(const Element* x, int64_t column) const {
    const Real value = widen(x[column]);
    if constexpr (kCapped)
      if (value != -Real(INFINITY)) return options.softcap * tanh_of(value / options.softcap);
    return value;
  }

  // the first n < kLanes elements, -inf behind them
  static Register load_part(const Element* x, int64_t n) {
    Element buffer[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      if (lane < n)
        buffer[lane] = x[lane];
      else
        narrow(-Real(INFINITY), buffer + lane);
    }
    return V::load(buffer);
  }
  static void store_part(Element* out, int64_t n, Register v) {
    Element buffer[kLanes];
    V::store(buffer, v);
    for (int64_t lane = 0; lane < n; ++lane) out[lane] = buffer[lane];
  }

  // Columns behind kTailId, -1: absent; they may repeat.
  struct Named {
    const int32_t* ids;
    int64_t n;
  };
  // A part of a row with the named columns that are among it, which a sum leaves out: the groups of kGroup that have any.
  static constexpr int64_t kGroup = 4 * kLanes;
  struct Part {
    const Element* x;
    int64_t begin, end;
    Named named;
    uint64_t groups;  // a bit for each
  };
  // `found` has room for the named columns of a part, unless they repeat
  static constexpr int64_t kMostFound = kBlock;
  static Part part_of(const Element* x, int64_t begin, int64_t end, Named named, int32_t* found) {
    Part part{x, begin, end, named, 0};
    const auto n = uint32_t(end - begin);
    bool any = false;
    for (int64_t k = 0; k < named.n; ++k) any |= uint32_t(named.ids[k]) - uint32_t(begin) < n;
    if (!any) return part;
    int64_t n_found = 0;
    for (int64_t k = 0; k < named.n; ++k) {
      const uint32_t place = uint32_t(named.ids[k]) - uint32_t(begin);
      if (place >= n) continue;
      part.groups |= uint64_t(1) << place / uint32_t(kGroup);
      if (n_found < kMostFound) found[n_found] = named.ids[k];
      ++n_found;
    }
    if (n_found <= kMostFound) part.named = {found, n_found};
    return part;
  }
  // n elements of a row from column `first` on, -inf in place of the named ones
  static const Element* without_named(const Element* x, int64_t first, int64_t n, Named named, Element* buffer) {
    __builtin_memcpy(buffer, x + first, size_t(n) * sizeof(Element));
    for (int64_t k = 0; k < named.n; ++k) {
      const uint32_t place = uint32_t(named.ids[k]) - uint32_t(first);
      if (place < uint32_t(n)) narrow(-Real(INFINITY), buffer + place);
    }
    return buffer;
  }

  // Sums over some columns, with d = value - reference in logits (not yet divided by T) and e = e^(d / T).
  struct Lanes {
    Register max, rest, weighted, sum, count;
  };
  static Lanes no_lanes() {
    return {V::set(-Real(INFINITY)), V::set(Real(0)), V::set(Real(0)), V::set(Real(0)), V::set(Real(0))};
  }
  // kMasked: there may be a -inf among the values; its e is 0, and 0 * -inf must not reach a sum
  template <bool kMasked>
  void add(Lanes& lanes, Register value, Register reference) const {
    Register d = V::sub(value, reference);
    const Register e = exponential(d);
    lanes.max = V::max(value, lanes.max);  // a nan is left out: the second where either is one
    lanes.rest = V::add(lanes.rest, e);
    if constexpr (kDense) {
      if constexpr (kMasked) {
        const auto present = V::not_equal(d, V::set(-Real(INFINITY)));
        d = V::keep(present, d);
        lanes.count = V::add(lanes.count, V::keep(present, V::set(Real(1))));
      }
      lanes.weighted = V::fma(e, d, lanes.weighted);
      lanes.sum = V::add(lanes.sum, d);
    }
  }
  struct Sums {
    Real max;
    double rest, weighted, sum, count;  // rest: all e, the maximum included
  };
  Sums sum_block(const Element* x, int64_t begin, int64_t end, Real reference) const {
    return sum_part({x, begin, end, {nullptr, 0}, 0}, reference);
  }
  Sums sum_part(const Part& part, Real reference) const {
    const Sums sums = sum_lanes<false>(part, reference);
    if (!kDense || sums.sum > -double(INFINITY)) return sums;
    return sum_lanes<true>(part, reference);  // a masked column, or a nan
  }
  template <bool kMasked>
  Sums sum_lanes(const Part& part, Real reference_logit) const {
    const int64_t begin = part.begin, end = part.end;
    const Element* x = part.x;
    Element buffer[kGroup];
    uint64_t groups = part.groups;
    const Register reference = V::set(reference_logit);
    Lanes lanes[4] = {no_lanes(), no_lanes(), no_lanes(), no_lanes()};
    int64_t i = begin;
    for (; i + kGroup <= end; i += kGroup, groups >>= 1) {
      const Element* group = x + i;
      if (groups & 1) group = without_named(x, i, kGroup, part.named, buffer);
      for (int k = 0; k < 4; k += 2) {
        const auto pair = V::load_pair(group + k * kLanes);
        add<kMasked>(lanes[k], effective(pair.first), reference);
        add<kMasked>(lanes[k + 1], effective(pair.second), reference);
      }
    }
    if (groups & 1) x = without_named(x, i, end - i, part.named, buffer) - i;
    for (; i + kLanes <= end; i += kLanes) add<kMasked>(lanes[0], effective(V::load(x + i)), reference);
    const double n_present = kMasked ? 0 : double(i - begin);
    if (i < end) add<true>(lanes[1], effective(load_part(x + i, end - i)), reference);
    const auto of_all = [&](Register Lanes::* field, auto join) {
      return join(join(lanes[0].*field, lanes[1].*field), join(lanes[2].*field, lanes[3].*field));
    };
    Sums sums{V::largest(of_all(&Lanes::max, V::max)), V::total(of_all(&Lanes::rest, V::add)), 0, 0, 0};
    if constexpr (kDense) {
      sums.weighted = V::total(of_all(&Lanes::weighted, V::add));
      sums.sum = V::total(of_all(&Lanes::sum, V::add));
      sums.count = n_present + V::total(of_all(&Lanes::count, V::add));
    }
    return sums;
  }
  Real largest_in(const Element* x, int64_t begin, int64_t end) const {
    Register max = V::set(-Real(INFINITY));
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) max = V::max(effective(V::load(x + i)), max);
    if (i < end) max = V::max(effective(load_part(x + i, end - i)), max);
    return V::largest(max);
  }
  int64_t first_equal(const Element* x, int64_t begin, int64_t end, Real wanted) const {
    for (int64_t i = begin; i < end; i += kLanes) {
      const int64_t n = end - i < kLanes ? end - i : kLanes;
      const Register value = effective(n < kLanes ? load_part(x + i, n) : V::load(x + i));
      if (!V::any_equal(value, V::set(wanted))) continue;
      Real values[kLanes];
      V::store(values, value);
      for (int lane = 0; lane < kLanes; ++lane)
        if (values[lane] == wanted) return i + lane;
    }
    return -1;
  }
  // how many logits, as they are stored, are greater than that of this column
  Real rank_of(const Element* x, int64_t column) const {
    const Real own = widen(x[column]);
    if (own != own) return Real(arguments.vocab_size);
    const Register wanted = V::set(own), one = V::set(Real(1)), zero = V::set(Real(0));
    Register counts[4] = {zero, zero, zero, zero};  // each a whole number below 2^24
    const auto add = [&](int lane, Register logits) {
      counts[lane] = V::add(counts[lane], V::keep(V::less(wanted, logits), one));
    };
    const int64_t n = arguments.vocab_size;
    int64_t i = 0;
    for (; i + 4 * kLanes <= n; i += 4 * kLanes)
      for (int k = 0; k < 4; k += 2) {
        const auto pair = V::load_pair(x + i + k * kLanes);
        add(k, pair.first), add(k + 1, pair.second);
      }
    for (; i < n; i += kLanes) add(0, n - i < kLanes ? load_part(x + i, n - i) : V::load(x + i));
    return V::total(V::add(V::add(counts[0], counts[1]), V::add(counts[2], counts[3])));
  }
  // sums over the columns of [begin, end) but i*
  Sums sum_without(const Element* x, int64_t begin, int64_t end, int64_t argmax, Real reference) const {
    Sums sums = sum_block(x, begin, begin + (argmax - begin) / kLanes * kLanes, reference);
    const int64_t first = begin + (argmax - begin) / kLanes * kLanes,
                  last = first + kLanes < end ? first + kLanes : end;
    Element buffer[kLanes];
    for (int64_t i = first; i < last; ++i) buffer[i - first] = x[i];
    narrow(-Real(INFINITY), buffer + (argmax - first));
    const Sums around = sum_block(buffer, 0, last - first, reference), behind = sum_block(x, last, end, reference);
    sums.rest += around.rest + behind.rest;
    sums.weighted += around.weighted + behind.weighted;
    return sums;
  }

  // to another reference; nothing summed yet: no shift, which may be infinite, by nothing
  static void move(Sums& sums, double shift, double scale) {
    if (sums.rest == 0 && sums.count == 0) return;
    sums.weighted = scale > 0 ? scale * (sums.weighted + shift * sums.rest) : 0;  // the shift may be infinite
    sums.sum += shift * sums.count;
    sums.rest *= scale;
  }

  // A row of one block, with its finite maximum: nothing needs to be summed twice.
  RowStatistics<Real> measure_block(const Element* x, Real max) const {
    RowStatistics<Real> row = empty_statistics<Real>();
    const int64_t n = arguments.vocab_size;
    const auto argmax = int32_t(first_equal(x, 0, n, max));
    const Sums rest = sum_lanes<kDense>({x, 0, n, {&argmax, 1}, uint64_t(1) << argmax / kGroup}, max);
    row.max = max, row.argmax = Real(argmax), row.rest = Real(rest.rest), row.count = 1;
    if constexpr (kDense) {
      row.weighted = Real(rest.weighted * double(inverse_temperature));
      row.sum = Real(rest.sum * double(inverse_temperature));
      row.count += Real(rest.count);
    }
    return row;
  }

  // statistics of the columns that are not named
  RowStatistics<Real> measure(const Element* x, Named named = {nullptr, 0}) const {
    if (arguments.vocab_size <= kBlock && named.n == 0) {
      const Real max = largest_in(x, 0, arguments.vocab_size);
      if (max > lowest_finite<Real>() && max < Real(INFINITY)) return measure_block(x, max);
    }
    const Real slack = 32 * options.temperature;  // sums up to e^32 times the block's size stay far from overflow
    Real reference = lowest_finite<Real>();
    Sums all{-Real(INFINITY), 0, 0, 0, 0},
        best{-Real(INFINITY), 0, 0, 0, 0};  // best: the block with the maximum; all: the others
    int64_t best_begin = 0, best_end = 0;
    Element buffer[kBlock];
    int32_t found[kMostFound];
    const auto change_reference = [&](Real next) {
      const double shift = double(reference) - double(next), scale = exp_of(shift * double(inverse_temperature));
      move(all, shift, scale), move(best, shift, scale);
      reference = next;
    };
    for (int64_t begin = 0; begin < arguments.vocab_size; begin += kBlock) {
      const int64_t end = begin + kBlock < arguments.vocab_size ? begin + kBlock : arguments.vocab_size;
      const Part part = part_of(x, begin, end, named, found);
      if (reference == lowest_finite<Real>()) {
        const Element* block = part.groups ? without_named(x, begin, end - begin, named, buffer) : x + begin;
        const Real first = largest_in(block, 0, end - begin);
        if (first > lowest_finite<Real>()) change_reference(first);  // blocks of the lowest number may have been summed
      }
      Sums sums = sum_part(part, reference);
      if (sums.max > reference + slack) {
        change_reference(sums.max);
        sums = sum_part(part, reference);
      }
      const bool leads = sums.max > best.max;
      const Sums& other = leads ? best : sums;
      all.rest += other.rest, all.weighted += other.weighted, all.sum += other.sum, all.count += other.count;
      if (leads) best = sums, best_begin = begin, best_end = end;
    }
    RowStatistics<Real> row = empty_statistics<Real>();
    if (!(best.max > -Real(INFINITY))) {
      row.rest = Real(all.rest);  // 0, or nan
      if (row.rest != row.rest) row.count = 1, row.max = row.rest;
      return row;
    }
    row.max = best.max;
    const int64_t n_best = best_end - best_begin;
    const Element* const block = named.n ? without_named(x, best_begin, n_best, named, buffer) : x + best_begin;
    const int64_t place = first_equal(block, 0, n_best, row.max);
    row.argmax = Real(best_begin + place);
    change_reference(row.max);
    const Sums rest = sum_without(block, 0, n_best, place, row.max);
    row.rest = row.max == Real(INFINITY) ? Real(NAN) : Real(all.rest + rest.rest);  // +inf logits give nan, as in torch
    row.count = 1;  // a row that is there; its columns are counted in the dense kernels only
    if constexpr (kDense) {
      row.weighted = Real((all.weighted + rest.weighted) * double(inverse_temperature));
      row.sum = Real((all.sum + best.sum) * double(inverse_temperature));
      row.count = Real(all.count + best.count);
    }
    return row;
  }
  // Statistics of the row, and in *mass the sum of e^u over the columns that are not named: these are measured alone, and
  // the named ones added, because the difference of two sums could be anything. Each named column becomes an entry.
  template <class Entries>
  RowStatistics<Real> measure_apart(const Element* x, Named named, Entries& of_row, Real* mass) const {
    const RowStatistics<Real> others = measure(x, named);
    Real max = others.max, argmax = others.argmax, nan = 0;
    for (int64_t k = 0; k < named.n; ++k) {
      if (named.ids[k] < 0) continue;
      const Real value = effective_at(x, named.ids[k]);
      of_row.add(named.ids[k], value, 0, 0, true);
      if (value != value || value == Real(INFINITY)) nan = Real(NAN);
      if (value > max || (value == max && Real(named.ids[k]) < argmax)) max = value, argmax = Real(named.ids[k]);
    }
    const double shift = others.max == max ? 0 : (double(others.max) - double(max)) * double(inverse_temperature);
    const double scale = exp_of(shift), all = others.max == -Real(INFINITY) ? 0 : 1 + double(others.rest);
    Sums sums{max, scale * all + double(nan), 0, double(others.sum), double(others.count)};
    if (argmax == others.argmax) sums.rest = double(others.rest) + double(nan);
    if (kDense && scale > 0) sums.weighted = scale * (double(others.weighted) + shift * all);
    if (kDense && others.count > 0) sums.sum += shift * double(others.count);
    for (int64_t k = 0; k < of_row.n; ++k) {
      auto& entry = of_row.entries[k];
      const bool is_masked = entry.u == -Real(INFINITY), is_argmax = Real(entry.column) == argmax;
      if (!is_masked) entry.u = is_argmax ? Real(0) : (entry.u - max) * inverse_temperature;
      if (entry.u < lowest_finite<Real>() && !is_masked) entry.u = lowest_finite<Real>();
      entry.probability = exp_of(entry.u);
      if (is_masked) continue;
      if (!is_argmax) sums.rest += double(entry.probability);
      if (kDense && entry.probability > 0) sums.weighted += double(entry.u) * double(entry.probability);
      sums.sum += double(entry.u), sums.count += 1;
    }
    *mass = Real(scale * all);
    RowStatistics<Real> row{max, argmax, Real(sums.rest), Real(sums.weighted), Real(sums.sum), Real(sums.count)};
    for (int64_t k = 0; k < of_row.n; ++k) of_row.entries[k].probability /= 1 + row.rest;
    if (!kDense && row.count > 1) row.count = 1;
    return row;
  }
};

}  // namespace AVA_ISA
}  // namespace ava
