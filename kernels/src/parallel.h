// Splits loops over XLA's own thread pool. The calling thread works too, so a loop ends even when every pool thread
// is busy, and no thread beyond the pool's is ever started.
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

// Threads that stay together for a number of loops: they are woken once, and wait for the next loop by spinning,
// which is a hundred times quicker than a sleep and a wake-up. Loops begin and end on the thread that made the team.
//
// Each thread has a lane, a run of tasks that follow one another: what it reads is then one stream of memory. Who has
// finished a lane takes tasks from the ends of the others'.
class Team {
 public:
  explicit Team(xla::ffi::ThreadPool& pool)
      : pool_(pool), threads_(std::min<int64_t>(std::max<int64_t>(pool.num_threads(), 1), kMaxThreads)) {}
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;
  ~Team() {
    if (state_ != nullptr) state_->loop.store(kOver, std::memory_order_release);
  }

  // Runs body(0) to body(tasks - 1), in any order, and returns when all are done. What a body throws, the first of
  // them, it throws on when no thread uses the body any more.
  template <typename Body>
  void For(int64_t tasks, const Body& body) {
    if (tasks <= 1 || threads_ == 1 || tasks > kMaxTasks) {
      for (int64_t i = 0; i < tasks; ++i) body(i);
      return;
    }
    Begin(tasks, [](const void* context, int64_t i) { (*static_cast<const Body*>(context))(i); }, &body);
    Work(*state_, 0);
    // What is left is a task per helper at most: microseconds, shorter than a sleep and a wake-up.
    for (int spins = 0; state_->done.load(std::memory_order_acquire) < tasks; ++spins) Pause(spins);
    if (state_->failed.exchange(false, std::memory_order_acquire)) std::rethrow_exception(std::move(state_->error));
  }

 private:
  using Function = void (*)(const void*, int64_t);

  static constexpr int64_t kMaxThreads = 64, kMaxTasks = 0xffffff;
  static constexpr uint64_t kOver = ~uint64_t{0};

  // What is left of a lane, in one word: the loop's number in 16 bits, then the next task and the end in 24 each.
  struct alignas(64) Lane {
    std::atomic<uint64_t> left{0};
  };

  // Helpers may start, or look for work, after the team is gone: they hold the state, and touch a loop's body only
  // for a task they have drawn, which the caller waits for.
  struct State {
    explicit State(int64_t threads) : threads(threads), lanes(new Lane[static_cast<size_t>(threads)]) {}
    const int64_t threads;
    std::unique_ptr<Lane[]> lanes;
    std::atomic<uint64_t> loop{0};
    std::atomic<int64_t> done{0};
    std::atomic<Function> function{nullptr};
    std::atomic<const void*> context{nullptr};
    std::atomic<bool> failed{false};
    std::exception_ptr error;  // written by who sets `failed`, read when all tasks are done
  };

  static uint64_t Left(uint64_t loop, int64_t next, int64_t end) {
    return (loop & 0xffff) << 48 | static_cast<uint64_t>(next) << 24 | static_cast<uint64_t>(end);
  }

  static void Pause(int spins) {
    if (spins >= 4096) std::this_thread::yield();
#if defined(__x86_64__)
    else __builtin_ia32_pause();
#endif
  }

  void Begin(int64_t tasks, Function function, const void* context) {
    const bool first = state_ == nullptr;
    if (first) state_ = std::make_shared<State>(threads_);
    State& s = *state_;
    // Every lane of the loop before is empty. It is emptied in the new loop's name before anything else changes: who
    // sees any of the new fields can no longer draw by the old ones.
    const uint64_t loop = s.loop.load(std::memory_order_relaxed) + 1;
    for (int64_t i = 0; i < threads_; ++i) s.lanes[i].left.store(Left(loop, 0, 0), std::memory_order_release);
    s.done.store(0, std::memory_order_relaxed);
    s.function.store(function, std::memory_order_release);
    s.context.store(context, std::memory_order_release);
    for (int64_t i = 0; i < threads_; ++i)
      s.lanes[i].left.store(Left(loop, tasks * i / threads_, tasks * (i + 1) / threads_), std::memory_order_release);
    s.loop.store(loop, std::memory_order_release);
    // A pool that cannot take a task runs it at once, on the thread that brings it, which must not wait for itself.
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

  // Works on the loop at hand, its own lane first, until nothing is left to draw.
  static void Work(State& s, int64_t own) {
    for (int64_t i = 0; i < s.threads; ++i)
      while (DrawAndRun(s, (own + i) % s.threads, i == 0)) {
      }
  }

  // Runs the first task of its own lane, or the last of another's; false when the lane is empty.
  static bool DrawAndRun(State& s, int64_t lane, bool own) {
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

// Too little work is done by the calling thread alone.
template <typename Body>
void For(Team& team, bool alone, int64_t tasks, const Body& body) {
  if (!alone) return team.For(tasks, body);
  for (int64_t i = 0; i < tasks; ++i) body(i);
}

}  // namespace precast
