// Loops over independent tasks on torch's threads.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "common/torch.h"

namespace dnl {

inline bool& inside_a_task() {
  static thread_local bool inside = false;
  return inside;
}

struct InsideATask {  // marks this thread as one of several, for as long as it lives
  const bool before = inside_a_task();
  InsideATask() { inside_a_task() = true; }
  ~InsideATask() { inside_a_task() = before; }
};

// Those that a loop may use here: all of torch's, or this one where it already is one of several.
inline int64_t free_threads() { return inside_a_task() ? 1 : torch::stable::get_num_threads(); }

// A grain for tasks of which each costs something on its own: as many pieces as are shared out evenly, and no more.
inline int64_t grain_for(int64_t count) {
  const int64_t threads = free_threads(), pieces = threads > 1 ? 8 * threads : 1;
  return std::max<int64_t>(1, (count + pieces - 1) / pieces);
}

// body(begin, end) for the pieces of [begin, end) of at most `grain` tasks, each once, in parallel. Every thread begins
// with a share of its own, whose data lie together, and then takes pieces that others have not begun: a core that
// something else slows down holds up nobody. Results must not depend on who runs a piece, nor when.
template <class Body>
void parallel_tasks(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  const int64_t pieces = begin < end ? (end - begin + grain - 1) / grain : 0;
  const int64_t shares = std::min(pieces, free_threads());
  const auto run = [&](int64_t i) { body(begin + i * grain, std::min(end, begin + (i + 1) * grain)); };
  if (shares <= 1) {
    for (int64_t i = 0; i < pieces; i++) run(i);
    return;
  }
  struct alignas(64) Share {  // a cache line each
    std::atomic<int64_t> next{0};
  };
  std::vector<Share> share(shares);
  const auto first = [&](int64_t s) { return s * pieces / shares; };
  for (int64_t s = 0; s < shares; s++) share[s].next = first(s);
  torch::stable::parallel_for(0, shares, 1, [&](int64_t from, int64_t to) {
    const InsideATask mark;
    for (int64_t own = from; own < to; own++)
      for (int64_t k = 0; k < shares; k++) {
        const int64_t s = (own + k) % shares, last = first(s + 1);
        for (int64_t i; (i = share[s].next.fetch_add(1, std::memory_order_relaxed)) < last;) run(i);
      }
  });
}

}  // namespace dnl
