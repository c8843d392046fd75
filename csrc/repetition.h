// Repetition candidates: the tokens that would repeat something in the context of a row, found from token ids alone.
//
// A segment is a text of its own: row t predicts targets[t] from the context tokens[0 .. end), where end = t, or t + 1
// where the tokens are those that were read (tokens_include_row). A token equal to ignore_index is masked: it matches
// nothing, is no candidate and ends a run. Slots of a row, in this order; -1 with weight 0 where there is no candidate:
//
//   immediate   the last token of the context, weight immediate * min(growth^(run - 1), 4), where run >= threshold is
//               the number of equal tokens that end the context
//   EOS ids     each, while fewer than min_sequence_length counted rows of the segment precede the row
//   n-gram      the tokens that followed earlier occurrences of the last n - 1 tokens, distinct, most recent first
//
// n-grams in O(length), whatever the text. Each distinct (n-1)-gram, a key, owns a linked list of the distinct tokens
// that followed it, most recent first. Reading a position moves or adds one list node, found by hashing (key, token)
// in O(1). Tokens that can never be candidates are not put into lists, so that a row visits at most ngram_slots nodes
// and its own target; a window ends the visit at the first node that is too old. Hash hits are compared token by token.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

namespace ava {

struct RepetitionOptions {
  bool tokens_include_row = false;
  int64_t vocab_size = 0, ignore_index = -100;
  std::vector<int64_t> repetition_allow_list;  // sorted; these may repeat
  bool use_immediate_repetition_penalty = false;
  int64_t immediate_repetition_threshold = 1;
  int64_t ngram_size = 0, ngram_window_size = 0, ngram_slots = 0;  // size 0: no n-grams, window 0: the whole segment
  std::vector<int64_t> eos_ids;
  int64_t min_sequence_length = 0;

  int64_t n_slots() const {
    return use_immediate_repetition_penalty + static_cast<int64_t>(eos_ids.size()) + (ngram_size > 0 ? ngram_slots : 0);
  }
  bool may_penalize(int64_t token) const {
    return token >= 0 && token < vocab_size && token != ignore_index &&
           !std::binary_search(repetition_allow_list.begin(), repetition_allow_list.end(), token);
  }
  bool is_eos(int64_t token) const { return std::find(eos_ids.begin(), eos_ids.end(), token) != eos_ids.end(); }
};

// As a tensor: [kRepetitionWeights], in this order.
struct RepetitionWeights {
  double immediate, growth, eos, ngram;
};
constexpr int kRepetitionWeights = 4;

constexpr double kMostRunFactor = 4;  // by which a run's weight grows at most

// The number of equal tokens that end the context, and min(growth^(length - 1), kMostRunFactor).
struct Run {
  int64_t length = 0;
  double factor = 1;

  void read(bool repeats, double growth) {
    factor = repeats ? std::min(factor * growth, kMostRunFactor) : 1.0;
    length = repeats ? length + 1 : 1;
  }
};

// A test counts probes and visited nodes with a type of its own.
struct UncountedSteps {
  void operator++() {}
};

inline uint64_t mix_hash(uint64_t hash, int64_t value) {
  hash = (hash ^ static_cast<uint64_t>(value)) * 0xff51afd7ed558ccdull;  // the constant of MurmurHash3
  return hash ^ (hash >> 32);
}

inline uint64_t hash_key(const int64_t* key, int64_t key_length) {
  uint64_t hash = 0x9e3779b97f4a7c15ull;
  for (int64_t k = 0; k < key_length; ++k) hash = mix_hash(hash, key[k]);
  return hash;
}

inline uint64_t hash_follower(int32_t key, int64_t token) { return mix_hash(mix_hash(0, token), key); }

// Open addressing with linear probing; at most half full, so that a probe ends after O(1) expected steps.
template <class Steps>
class IdTable {
 public:
  void clear(int64_t max_entries) {
    size_t capacity = 16;
    while (capacity < 2 * static_cast<size_t>(max_entries)) capacity *= 2;
    entries_.assign(capacity, Entry{0, -1});
  }

  // the id with this hash for which is_same(id), or new_id, which is then in the table
  template <class IsSame>
  int32_t find_or_insert(uint64_t hash, int32_t new_id, Steps& steps, const IsSame& is_same) {
    const size_t mask = entries_.size() - 1;
    const uint32_t tag = static_cast<uint32_t>(hash >> 32);
    for (size_t slot = hash & mask;; slot = (slot + 1) & mask) {
      ++steps;
      Entry& entry = entries_[slot];
      if (entry.id < 0) {
        entry = {tag, new_id};
        return new_id;
      }
      if (entry.tag == tag && is_same(entry.id)) return entry.id;
    }
  }

 private:
  struct Entry {
    uint32_t tag;
    int32_t id;
  };
  std::vector<Entry> entries_;
};

// For every key of a segment the distinct tokens that followed it, most recent first. Memory is kept between segments.
template <class Steps = UncountedSteps>
class FollowerLists {
 public:
  static constexpr int32_t none = -1;
  struct Follower {
    int32_t position;  // where it followed its key last
    int32_t key, newer, older;
  };
  Steps steps;

  void start_segment(const int64_t* tokens, int64_t length, int64_t key_length) {
    tokens_ = tokens;
    key_length_ = key_length;
    keys_.clear();
    followers_.clear();
    key_table_.clear(length + 1);
    follower_table_.clear(length);
  }

  // id of the key tokens[end - key_length .. end)
  int32_t key_ending_at(int64_t end) {
    const int64_t* key = tokens_ + end - key_length_;
    const int32_t n_keys = static_cast<int32_t>(keys_.size());
    const int32_t id = key_table_.find_or_insert(hash_key(key, key_length_), n_keys, steps, [&](int32_t other) {
      return std::equal(key, key + key_length_, tokens_ + keys_[other].end - key_length_);
    });
    if (id == n_keys) keys_.push_back({static_cast<int32_t>(end), none});
    return id;
  }

  // tokens[position] followed the key: it becomes the key's most recent follower
  void add(int32_t key, int64_t position) {
    const int64_t token = tokens_[position];
    const int32_t n_followers = static_cast<int32_t>(followers_.size());
    const int32_t id = follower_table_.find_or_insert(
        hash_follower(key, token), n_followers, steps,
        [&](int32_t other) { return followers_[other].key == key && tokens_[followers_[other].position] == token; });
    if (id == n_followers) {
      followers_.push_back({static_cast<int32_t>(position), key, none, none});
    } else {
      followers_[id].position = static_cast<int32_t>(position);
      if (keys_[key].newest == id) return;
      unlink(id);
    }
    Follower& follower = followers_[id];
    follower.newer = none;
    follower.older = keys_[key].newest;
    if (follower.older != none) followers_[follower.older].newer = id;
    keys_[key].newest = id;
  }

  // calls visit(position, token) from the most recent follower on, until it returns false
  template <class Visit>
  void for_each(int32_t key, const Visit& visit) {
    for (int32_t id = keys_[key].newest; id != none; id = followers_[id].older) {
      ++steps;
      if (!visit(followers_[id].position, tokens_[followers_[id].position])) return;
    }
  }

 private:
  // not for the newest follower of a key, whose `newer` is none
  void unlink(int32_t id) {
    const Follower& follower = followers_[id];
    followers_[follower.newer].older = follower.older;
    if (follower.older != none) followers_[follower.older].newer = follower.newer;
  }

  struct Key {
    int32_t end;  // one place where it ends
    int32_t newest;
  };
  const int64_t* tokens_ = nullptr;
  int64_t key_length_ = 0;
  std::vector<Key> keys_;
  std::vector<Follower> followers_;
  IdTable<Steps> key_table_, follower_table_;
};

// The slots of one row, written in order.
template <class Weight>
struct RowSlots {
  int32_t* ids;
  Weight* weights;

  void put(int64_t id, double weight) {
    *ids++ = static_cast<int32_t>(id);
    *weights++ = static_cast<Weight>(weight);
  }
  void put_absent(int64_t n_slots) {
    for (int64_t slot = 0; slot < n_slots; ++slot) put(-1, 0);
  }
};

// All rows of one segment, whose length is below 2^31.
template <class Weight, class Steps>
void segment_candidates(const RepetitionOptions& options, const RepetitionWeights& weights,
                        const int64_t* tokens,   // [length]
                        const int64_t* targets,  // [length]
                        int64_t length, FollowerLists<Steps>& lists,
                        int32_t* ids,                 // [length, n_slots]
                        Weight* candidate_weights) {  // [length, n_slots]
  const int64_t n_slots = options.n_slots(), key_length = options.ngram_size - 1;
  const bool use_ngrams = options.ngram_size > 0;
  if (use_ngrams) lists.start_segment(tokens, length, key_length);
  Run run;
  int64_t n_unmasked = 0;  // that end the context
  int64_t n_counted = 0;   // rows so far

  for (int64_t end = 0; end < length + options.tokens_include_row; ++end) {
    const int32_t key = use_ngrams && n_unmasked >= key_length ? lists.key_ending_at(end) : lists.none;
    const int64_t row = end - options.tokens_include_row;
    if (row >= 0) {
      RowSlots<Weight> slots{ids + row * n_slots, candidate_weights + row * n_slots};
      const int64_t target = targets[row];
      if (target == options.ignore_index) {
        slots.put_absent(n_slots);
      } else {
        if (options.use_immediate_repetition_penalty) {
          const int64_t previous = run.length > 0 ? tokens[end - 1] : -1;
          if (run.length >= options.immediate_repetition_threshold && previous != target &&
              options.may_penalize(previous))
            slots.put(previous, weights.immediate * run.factor);
          else
            slots.put_absent(1);
        }
        if (n_counted < options.min_sequence_length && !options.is_eos(target))
          for (int64_t eos : options.eos_ids) slots.put(eos, weights.eos);
        else
          slots.put_absent(static_cast<int64_t>(options.eos_ids.size()));
        if (use_ngrams) {
          const int64_t oldest = options.ngram_window_size > 0 ? end - options.ngram_window_size : 0;
          int64_t n_free = options.ngram_slots;
          if (key != lists.none)
            lists.for_each(key, [&](int64_t position, int64_t token) {
              if (position < oldest) return false;
              if (token != target) slots.put(token, weights.ngram), --n_free;
              return n_free > 0;
            });
          slots.put_absent(n_free);
        }
        ++n_counted;
      }
    }
    if (end == length) break;  // the whole segment is read
    if (tokens[end] == options.ignore_index) {
      run = {};
      n_unmasked = 0;
    } else {
      run.read(run.length > 0 && tokens[end] == tokens[end - 1], weights.growth);
      ++n_unmasked;
    }
    if (key != lists.none && options.may_penalize(tokens[end])) lists.add(key, end);
  }
}

}  // namespace ava
