// The repetition lists by themselves: work counted on texts made to be slow, and keys that only their tokens tell
// apart.
#include "repetition.h"

#include <algorithm>
#include <cstdio>
#include <random>
#include <utility>
#include <vector>

#include "expect.h"

using ava::FollowerLists;

struct CountedSteps {
  int64_t n = 0;
  void operator++() { ++n; }
};

struct Random {
  std::mt19937_64 engine;
  int64_t below(int64_t bound) { return static_cast<int64_t>(engine() % static_cast<uint64_t>(bound)); }
};

static ava::RepetitionOptions ngram_options(int64_t ngram_size, int64_t vocab_size) {
  ava::RepetitionOptions options;
  options.vocab_size = vocab_size;
  options.ngram_size = ngram_size;
  options.ngram_slots = 4;
  return options;
}

static int64_t count_steps(const ava::RepetitionOptions& options, const std::vector<int64_t>& tokens,
                           const std::vector<int64_t>& targets) {
  FollowerLists<CountedSteps> lists;
  std::vector<int32_t> ids(tokens.size() * options.n_slots());
  std::vector<float> weights(ids.size());
  ava::segment_candidates(options, {1, 1, 1, 1}, tokens.data(), targets.data(), static_cast<int64_t>(tokens.size()),
                          lists, ids.data(), weights.data());
  return lists.steps.n;
}

template <class TokenAt>
static std::vector<int64_t> make_text(int64_t length, const TokenAt& token_at) {
  std::vector<int64_t> text(length);
  for (int64_t t = 0; t < length; ++t) text[t] = token_at(t);
  return text;
}

// A row visits its slots and its own target; reading a token costs two look-ups of a probe or two on average.
static void test_work_is_linear_in_the_text() {
  constexpr int64_t length = 1 << 15, vocab_size = 1 << 16;
  Random random;
  const std::vector<std::pair<const char*, std::vector<int64_t>>> texts = {
      {"constant", make_text(length, [](int64_t) { return 7; })},
      {"period 7", make_text(length, [](int64_t t) { return t % 7; })},
      {"all distinct", make_text(length, [](int64_t t) { return t; })},
      {"all distinct, far apart", make_text(length, [](int64_t t) { return t << 16; })},
      {"one key, new followers", make_text(length, [](int64_t t) { return t % 2 ? 1 + t : 0; })},
      {"one key, excluded followers", make_text(length, [](int64_t t) { return t % 2 ? 1000 + t % 500 : 0; })},
      {"one key, outside followers", make_text(length, [](int64_t t) { return t % 2 ? vocab_size + t : 0; })},
      {"one key, masked followers", make_text(length, [](int64_t t) { return t % 2 ? -100 : 0; })},
      {"two tokens", make_text(length, [&](int64_t) { return random.below(2); })},
      {"random", make_text(length, [&](int64_t) { return random.below(vocab_size); })},
  };
  for (int64_t ngram_size : {1, 2, 4}) {
    ava::RepetitionOptions options = ngram_options(ngram_size, vocab_size);
    for (int64_t token = 1000; token < 1500; ++token) options.repetition_allow_list.push_back(token);
    for (int64_t window : {0, 100}) {
      options.ngram_window_size = window;
      for (const auto& [name, text] : texts) {
        const std::vector<int64_t> targets(text.size(), 3);
        for (const auto& row_targets : {text, targets}) {
          const double steps_per_token = static_cast<double>(count_steps(options, text, row_targets)) / length;
          EXPECT(steps_per_token <= options.ngram_slots + 1 + 4);
          if (steps_per_token > options.ngram_slots + 1 + 4)
            std::printf("    %s, n = %d: %.1f steps per token\n", name, static_cast<int>(ngram_size), steps_per_token);
        }
      }
    }
  }
}

static std::vector<int32_t> ids_of_last_row(const ava::RepetitionOptions& options, const std::vector<int64_t>& tokens) {
  FollowerLists<> lists;
  std::vector<int32_t> ids(tokens.size() * options.n_slots());
  std::vector<float> weights(ids.size());
  const std::vector<int64_t> targets(tokens.size(), 0);
  ava::segment_candidates(options, {1, 1, 1, 1}, tokens.data(), targets.data(), static_cast<int64_t>(tokens.size()),
                          lists, ids.data(), weights.data());
  return std::vector<int32_t>(ids.end() - options.n_slots(), ids.end());
}

// The tables of a short text look at the upper 32 bits and the lowest 4. Two of 2^20 random tokens that agree there:
template <class Hash>
static std::pair<int64_t, int64_t> find_collision(int64_t bound, const Hash& hash) {
  const auto seen = [&](int64_t token) { return (hash(token) & 0xffffffff00000000ull) | (hash(token) & 15); };
  Random random;
  std::vector<int64_t> tokens(1 << 20);
  for (int64_t& token : tokens) token = random.below(bound);
  std::sort(tokens.begin(), tokens.end(), [&](int64_t a, int64_t b) { return seen(a) < seen(b); });
  const auto twins = std::adjacent_find(tokens.begin(), tokens.end(),
                                        [&](int64_t a, int64_t b) { return a != b && seen(a) == seen(b); });
  EXPECT(twins != tokens.end());
  return twins == tokens.end() ? std::pair<int64_t, int64_t>{1, 2} : std::pair<int64_t, int64_t>{twins[0], twins[1]};
}

static void test_equal_hashes_are_told_apart() {
  constexpr int64_t vocab_size = (1ll << 31) - 1;
  const auto [key_a, key_b] = find_collision(1ll << 62, [](int64_t token) { return ava::hash_key(&token, 1); });
  const auto last_row = [&](int64_t n, std::vector<int64_t> text) {
    return ids_of_last_row(ngram_options(n, vocab_size), text);
  };
  EXPECT(last_row(2, {key_a, 5, key_b, 6}) == std::vector<int32_t>({-1, -1, -1, -1}));
  EXPECT(last_row(2, {key_a, 5, key_a, 6}) == std::vector<int32_t>({5, -1, -1, -1}));

  const auto [token_a, token_b] =
      find_collision(vocab_size, [](int64_t token) { return ava::hash_follower(0, token); });
  const std::vector<int32_t> both{static_cast<int32_t>(token_b), static_cast<int32_t>(token_a), -1, -1};
  EXPECT(last_row(1, {token_a, token_b, 6}) == both);
}

int main() {
  test_work_is_linear_in_the_text();
  test_equal_hashes_are_told_apart();
  return expect::exit_code();
}
