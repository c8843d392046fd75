// bfloat16 and float16 in the portable vector type: bit by bit what element_type.h makes of each number alone.
#include "cpu/vector_portable.h"

#include <vector>

#include "expect.h"

using V = ava::VectorFloat;

static bool same(float a, float b) { return ava::float_to_bits(a) == ava::float_to_bits(b) || (a != a && b != b); }

// any exponent, and the significands next to where a rounding changes
static std::vector<float> numbers() {
  std::vector<float> all;
  for (uint32_t upper = 0; upper < 0x10000; ++upper)
    for (uint32_t lower : {0x0000u, 0x0001u, 0x1000u, 0x7fffu, 0x8000u, 0x8001u, 0xefffu, 0xffffu})
      all.push_back(ava::bits_to_float(upper << 16 | lower));
  return all;
}

template <class Element>
static void test_conversions() {
  int n_wrong = 0;
  for (uint32_t first = 0; first < 0x10000; first += 2 * V::kLanes) {
    Element elements[2 * V::kLanes];
    for (int i = 0; i < 2 * V::kLanes; ++i) elements[i].bits = uint16_t(first + i);
    const V::Register v = V::load(elements);
    for (int i = 0; i < V::kLanes; ++i) n_wrong += !same(v[i], ava::widen(elements[i]));
    Element back[2 * V::kLanes];  // in whatever order a pair has
    V::store_pair(back, V::load_pair(elements));
    for (int i = 0; i < 2 * V::kLanes; ++i) n_wrong += !same(ava::widen(back[i]), ava::widen(elements[i]));
  }
  const std::vector<float> values = numbers();
  for (size_t first = 0; first < values.size(); first += V::kLanes) {
    const V::Register v = V::load(&values[first]);
    Element stored[V::kLanes], in_pair[2 * V::kLanes], alone;
    V::store(stored, v);
    V::store_pair(in_pair, {v, v});
    const V::Pair pair = V::load_pair(in_pair);
    for (int i = 0; i < V::kLanes; ++i) {
      ava::narrow(values[first + i], &alone);
      const float expected = ava::widen(alone);
      n_wrong +=
          !same(ava::widen(stored[i]), expected) + !same(pair.first[i], expected) + !same(pair.second[i], expected);
    }
  }
  EXPECT(n_wrong == 0);
}

int main() {
  test_conversions<ava::BFloat16>();
  test_conversions<ava::Float16>();
  return expect::exit_code();
}
