// Steps that follow each other, each of independent tasks, in one parallel region: what a loop over parallel_tasks would
// do, without ending a region and starting another between the steps, which costs as much as a layer of a small map.
#pragma once
#include <thread>

#include "common/parallel.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dnl {

inline void pause_a_moment(int64_t waited) {
  if (waited > 4096) return std::this_thread::yield();  // whoever is waited for may need this core
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// body(phase, task, own) for the tasks [0, count(phase)) of phases 0, 1, ..: those of a phase in parallel, and after all
// of the phases before. own: what prepare() made for the thread (working memory), before its first task. Nobody waits for
// a thread that has not begun a task: where torch runs fewer threads than it promised, the others do all of the work.
// body must not throw.
template <class Prepare, class Count, class Body>
void parallel_phases(int64_t phases, const Prepare& prepare, const Count& count, const Body& body) {
  const int64_t shares = free_threads();
  if (shares <= 1) {
    auto own = prepare();
    for (int64_t phase = 0; phase < phases; phase++)
      for (int64_t task = 0, n = count(phase); task < n; task++) body(phase, task, own);
    return;
  }
  struct alignas(64) Counter {
    std::atomic<int64_t> value{0};
  };
  std::vector<Counter> begun(phases * shares), done(phases);
  torch::stable::parallel_for(0, shares, 1, [&](int64_t from, int64_t to) {
    const InsideATask mark;
    auto own = prepare();
    for (int64_t share = from; share < to; share++)
      for (int64_t phase = 0; phase < phases; phase++) {
        const int64_t tasks = count(phase);
        int64_t finished = 0;
        for (int64_t k = 0; k < shares; k++) {  // the own share, then what others have not begun
          const int64_t s = (share + k) % shares, first = s * tasks / shares, end = (s + 1) * tasks / shares;
          std::atomic<int64_t>& next = begun[phase * shares + s].value;
          for (int64_t i; (i = first + next.fetch_add(1, std::memory_order_relaxed)) < end; finished++)
            body(phase, i, own);
        }
        done[phase].value.fetch_add(finished, std::memory_order_acq_rel);
        for (int64_t waited = 0; done[phase].value.load(std::memory_order_acquire) < tasks; waited++)
          pause_a_moment(waited);
      }
  });
}

}  // namespace dnl
