// Stands in for XLA's header: all that parallel.h uses, a pool, here one whose threads start late and out of step, or
// one that is full, and then does as XLA's does: runs what it is given at once, on the thread that gives it.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <thread>
#include <utility>
#include <vector>

namespace xla::ffi {

class ThreadPool {
 public:
  explicit ThreadPool(int64_t threads, bool full = false) : threads_(threads), full_(full) {}
  ~ThreadPool() {
    for (std::thread& thread : running_) thread.join();
  }
  int64_t num_threads() const { return threads_; }
  int64_t scheduled() const { return scheduled_; }

  void Schedule(std::function<void()> task) {
    // None, 50, 100 or 150 microseconds later: often when the loop it was to help with has long ended.
    const auto delay = std::chrono::microseconds(50 * (scheduled_++ % 4));
    if (full_) return task();
    running_.emplace_back([task = std::move(task), delay] {
      if (delay.count() > 0) std::this_thread::sleep_for(delay);
      task();
    });
  }

 private:
  int64_t threads_, scheduled_ = 0;
  bool full_;
  std::vector<std::thread> running_;
};

}  // namespace xla::ffi
