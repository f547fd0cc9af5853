// Loops over independent tasks on torch's threads.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "common/torch.h"

namespace dnl {

// body(begin, end) for the pieces of [begin, end) of at most `grain` tasks, each once, in parallel. Every thread begins
// with a share of its own, whose data lie together, and then takes pieces that others have not begun: a core that
// something else slows down holds up nobody. Results must not depend on who runs a piece, nor when.
template <class Body>
void parallel_tasks(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  const int64_t pieces = begin < end ? (end - begin + grain - 1) / grain : 0;
  const int64_t shares = std::min<int64_t>(pieces, torch::stable::get_num_threads());
  struct alignas(64) Share {  // a cache line each
    std::atomic<int64_t> next{0};
  };
  std::vector<Share> share(shares);
  const auto first = [&](int64_t s) { return s * pieces / shares; };
  for (int64_t s = 0; s < shares; s++) share[s].next = first(s);
  torch::stable::parallel_for(0, shares, 1, [&](int64_t from, int64_t to) {
    for (int64_t own = from; own < to; own++)
      for (int64_t k = 0; k < shares; k++) {
        const int64_t s = (own + k) % shares, last = first(s + 1);
        for (int64_t i; (i = share[s].next.fetch_add(1, std::memory_order_relaxed)) < last;)
          body(begin + i * grain, std::min(end, begin + (i + 1) * grain));
      }
  });
}

}  // namespace dnl
