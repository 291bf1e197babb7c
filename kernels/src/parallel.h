// Splits a loop over XLA's own thread pool. The calling thread works too, so the loop ends even when every pool
// thread is busy, and no thread beyond the pool's is ever started.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace precast {

template <typename Body>
void ParallelFor(xla::ffi::ThreadPool& pool, int64_t tasks, const Body& body) {
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), tasks) - 1;
  if (helpers <= 0) {
    for (int64_t i = 0; i < tasks; ++i) body(i);
    return;
  }
  // Helpers may start after the loop has ended: they hold the counters, and touch `body` only for a task they
  // have drawn, which the caller waits for.
  struct Shared {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto shared = std::make_shared<Shared>();
  auto work = [shared, tasks, &body] {
    for (int64_t i; (i = shared->next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
      body(i);
      shared->done.fetch_add(1, std::memory_order_release);
    }
  };
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([work] { work(); });
  work();
  // What is left is one task per helper at most: microseconds, shorter than a sleep and a wake-up.
  for (int spins = 0; shared->done.load(std::memory_order_acquire) < tasks; ++spins) {
    if (spins >= 4096) std::this_thread::yield();
#if defined(__x86_64__)
    else __builtin_ia32_pause();
#endif
  }
}

}  // namespace precast
