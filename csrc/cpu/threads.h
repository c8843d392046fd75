// Torch's own threads, so that torch.set_num_threads holds here too. What a piece of work throws reaches the caller;
// through torch's C interface it would lose its type and its message.
#pragma once
#include <atomic>
#include <exception>

#include "../torch_stable.h"

namespace ava {

// work(begin, end) for ranges that make up [0, n), of `grain` at least
template <class Work>
void parallel_for(int64_t n, int64_t grain, const Work& work) {
  std::atomic<bool> has_failed{false};
  std::exception_ptr error;  // the first one
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
    try {
      work(begin, end);
    } catch (...) {
      if (!has_failed.exchange(true)) error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

// work() in so many threads at the same time; they share out among themselves what there is to do
template <class Work>
void in_threads(int64_t n_threads, const Work& work) {
  if (n_threads == 1) return work();
  parallel_for(n_threads, 1, [&](int64_t, int64_t) { work(); });
}

}  // namespace ava
