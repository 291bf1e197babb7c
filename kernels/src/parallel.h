// Loops split over XLA's thread pool; no other threads are started. The calling thread works too, so that a loop ends
// even if every pool thread is busy.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <thread>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace precast {

// A team of threads for several loops. Helpers wake up once and spin until the next loop, which is a hundred times
// faster than sleeping and waking. Loops begin and end on the thread that made the team.
//
// Each thread has a lane of consecutive tasks, so that it reads one stream of memory. A thread that finishes its lane
// steals from the tail of another.
class Team {
 public:
  explicit Team(xla::ffi::ThreadPool& pool)
      : pool_(pool), threads_(std::min<int64_t>(std::max<int64_t>(pool.num_threads(), 1), kMaxThreads)) {}
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;
  ~Team() {
    if (state_ != nullptr) state_->loop.store(kOver, std::memory_order_release);
  }

  // Run body(0) to body(tasks - 1) in any order and return when all are done. Rethrow the first exception of a body
  // after every thread has stopped using the body.
  template <typename Body>
  void For(int64_t tasks, const Body& body) {
    if (tasks <= 1 || threads_ == 1 || tasks > kMaxTasks) {
      for (int64_t i = 0; i < tasks; ++i) body(i);
      return;
    }
    Begin(tasks, [](const void* context, int64_t i) { (*static_cast<const Body*>(context))(i); }, &body);
    Work(*state_, 0);
    // Spin, because each helper runs at most one more task. That takes microseconds, less than a sleep and a wake-up.
    for (int spins = 0; state_->done.load(std::memory_order_acquire) < tasks; ++spins) Pause(spins);
    if (state_->failed.exchange(false, std::memory_order_acquire)) std::rethrow_exception(std::move(state_->error));
  }

 private:
  using Function = void (*)(const void*, int64_t);

  static constexpr int64_t kMaxThreads = 64, kMaxTasks = 0xffffff;
  static constexpr uint64_t kOver = ~uint64_t{0};

  // The remaining tasks of a lane in one word: the number of the loop in 16 bits, then the next task and the end in 24
  // bits each.
  struct alignas(64) Lane {
    std::atomic<uint64_t> left{0};
  };

  // Helpers share ownership of the state, because they may start or look for work after the team is destroyed. They use
  // the body of a loop only for a task that they have taken, and the caller waits for that task.
  struct State {
    explicit State(int64_t threads) : threads(threads), lanes(new Lane[static_cast<size_t>(threads)]) {}
    const int64_t threads;
    std::unique_ptr<Lane[]> lanes;
    std::atomic<uint64_t> loop{0};
    std::atomic<int64_t> done{0};
    std::atomic<Function> function{nullptr};
    std::atomic<const void*> context{nullptr};
    std::atomic<bool> failed{false};
    std::exception_ptr error;  // written by the thread that sets `failed`, read when all tasks are done
  };

  static uint64_t Left(uint64_t loop, int64_t next, int64_t end) {
    return (loop & 0xffff) << 48 | static_cast<uint64_t>(next) << 24 | static_cast<uint64_t>(end);
  }

  static void Pause(int spins) {
    if (spins >= 4096) std::this_thread::yield();
#if defined(__x86_64__)
    else
      __builtin_ia32_pause();
#endif
  }

  void Begin(int64_t tasks, Function function, const void* context) {
    const bool first = state_ == nullptr;
    if (first) state_ = std::make_shared<State>(threads_);
    State& s = *state_;
    // Every lane of the previous loop is empty. Tag the empty lanes with the new loop before changing other fields, so
    // that a thread that sees a new field cannot take a task with the old ones.
    const uint64_t loop = s.loop.load(std::memory_order_relaxed) + 1;
    for (int64_t i = 0; i < threads_; ++i) s.lanes[i].left.store(Left(loop, 0, 0), std::memory_order_release);
    s.done.store(0, std::memory_order_relaxed);
    s.function.store(function, std::memory_order_release);
    s.context.store(context, std::memory_order_release);
    for (int64_t i = 0; i < threads_; ++i)
      s.lanes[i].left.store(Left(loop, tasks * i / threads_, tasks * (i + 1) / threads_), std::memory_order_release);
    s.loop.store(loop, std::memory_order_release);
    // A full pool runs the task at once on the calling thread, which must not wait for itself.
    for (int64_t i = 1; first && i < threads_; ++i)
      pool_.Schedule([state = state_, i, caller = std::this_thread::get_id()] {
        if (std::this_thread::get_id() != caller) Help(*state, i);
      });
  }

  static void Help(State& s, int64_t lane) {
    uint64_t seen = 0;
    for (int spins = 0;; ++spins) {
      const uint64_t loop = s.loop.load(std::memory_order_acquire);
      if (loop == kOver) return;
      if (loop != seen) {
        Work(s, lane);
        seen = loop;
        spins = 0;
      }
      Pause(spins);
    }
  }

  // Work on the current loop, its own lane first, until all lanes are empty.
  static void Work(State& s, int64_t own) {
    for (int64_t i = 0; i < s.threads; ++i)
      while (TakeAndRun(s, (own + i) % s.threads, i == 0)) {
      }
  }

  // Run the first task of the thread's own lane, or the last task of another lane. Return false if the lane is empty.
  static bool TakeAndRun(State& s, int64_t lane, bool own) {
    std::atomic<uint64_t>& left = s.lanes[lane].left;
    uint64_t was = left.load(std::memory_order_acquire);
    for (;;) {
      const Function function = s.function.load(std::memory_order_acquire);
      const void* context = s.context.load(std::memory_order_acquire);
      const int64_t next = was >> 24 & 0xffffff, end = was & 0xffffff;
      if (next >= end) return false;
      const uint64_t now = own ? was + (uint64_t{1} << 24) : was - 1;
      if (!left.compare_exchange_weak(was, now, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
      try {
        function(context, own ? next : end - 1);
      } catch (...) {
        if (!s.failed.exchange(true, std::memory_order_relaxed)) s.error = std::current_exception();
      }
      s.done.fetch_add(1, std::memory_order_release);
      return true;
    }
  }

  xla::ffi::ThreadPool& pool_;
  const int64_t threads_;
  std::shared_ptr<State> state_;
};

// Run the loop with the team, or on the calling thread alone if the work is too little to split.
template <typename Body>
void For(Team& team, bool alone, int64_t tasks, const Body& body) {
  if (!alone) return team.For(tasks, body);
  for (int64_t i = 0; i < tasks; ++i) body(i);
}

}  // namespace precast
