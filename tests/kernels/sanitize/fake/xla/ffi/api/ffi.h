// A substitute for XLA's header with the pool that parallel.h uses. Its threads start late and at different times. A
// full pool behaves like XLA's and runs a task at once, on the thread that schedules it.
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
    // A delay of 0, 50, 100 or 150 microseconds, so that many threads start after their loop has ended.
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
