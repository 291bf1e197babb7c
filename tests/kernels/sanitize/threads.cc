// Teams on a pool whose threads start late, under a sanitizer. Each task runs once and ends before its loop ends; the
// caller and the next loop see its writes; no thread uses the memory of a loop that has ended.
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <stdexcept>
#include <thread>
#include <vector>

#include "parallel.h"

namespace {

using precast::Team;
using xla::ffi::ThreadPool;

// Counts in plain memory, freed with the body after the loop, so that the sanitizer catches a late access to either.
bool Loop(Team& team, int64_t tasks, bool slow) {
  auto counts = std::make_unique<std::vector<int>>(static_cast<size_t>(tasks));
  auto add = [&counts, tasks, slow](int64_t task) {
    // The last tasks are slow: some still run when no task is left to take.
    if (slow && task + 8 >= tasks) std::this_thread::sleep_for(std::chrono::microseconds(40 * (task % 3)));
    ++(*counts)[static_cast<size_t>(task)];
  };
  auto body = std::make_unique<decltype(add)>(add);
  team.For(tasks, *body);
  body.reset();
  for (const int count : *counts)
    if (count != 1) return false;
  return true;
}

// A team for several loops with different numbers of tasks.
bool Loops(ThreadPool& pool, int64_t tasks, int loops, bool slow) {
  Team team(pool);
  for (int i = 0; i < loops; ++i)
    if (!Loop(team, i % 3 == 2 ? tasks / 2 : tasks, slow)) return false;
  return true;
}

// Every loop reads the results of the previous loop, in reverse order.
bool Chain(ThreadPool& pool, int64_t tasks, int loops) {
  Team team(pool);
  std::vector<int64_t> even(static_cast<size_t>(tasks), 1), odd(even);
  for (int i = 0; i < loops; ++i) {
    const std::vector<int64_t>& from = i % 2 ? odd : even;
    std::vector<int64_t>& to = i % 2 ? even : odd;
    team.For(tasks, [&](int64_t task) {
      const auto at = static_cast<size_t>(task), other = static_cast<size_t>(tasks - 1 - task);
      to[at] = from[other] + 1;
    });
    // The caller also writes between the loops, and helpers must see its writes.
    for (int64_t& number : to) ++number;
  }
  for (const int64_t number : loops % 2 ? odd : even)
    if (number != 1 + 2 * loops) return false;
  return true;
}

// The caller pauses between two loops until helpers yield instead of spinning.
bool Waiting(ThreadPool& pool) {
  Team team(pool);
  for (int i = 0; i < 3; ++i) {
    if (!Loop(team, 50, true)) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  return true;
}

// Two teams at once on one thread, as in a call from within a task.
bool Nested(ThreadPool& pool) {
  Team outer(pool);
  Team inner(pool);
  for (int i = 0; i < 4; ++i)
    if (!Loop(outer, 9, false) || !Loop(inner, 7, false)) return false;
  return true;
}

// More loops than the loop number of a lane can count.
bool Many(ThreadPool& pool) {
  Team team(pool);
  int64_t sums[3] = {};
  for (int64_t i = 0; i < 70000; ++i) {
    team.For(3, [&](int64_t task) { sums[task] += i; });
    if (sums[0] != sums[1] || sums[0] != sums[2] || sums[0] != i * (i + 1) / 2) return false;
  }
  return true;
}

// A team without a loop, or with loops too small to split, schedules no thread.
bool Unused(ThreadPool& pool) {
  {
    Team team(pool);
  }
  Team team(pool);
  return Loop(team, 0, false) && Loop(team, 1, false) && pool.scheduled() == 0;
}

int Check(bool ok, const char* what, int64_t threads, int64_t tasks) {
  if (ok) return 0;
  std::fprintf(stderr, "%s: %d threads, %d tasks\n", what, static_cast<int>(threads), static_cast<int>(tasks));
  return 1;
}

// The loop rethrows the exception of a task after all threads have left its body; the team can then run another loop.
bool Throws(xla::ffi::ThreadPool& pool) {
  precast::Team team(pool);
  bool caught = false;
  {
    auto counts = std::make_unique<std::vector<int>>(100);
    try {
      team.For(100, [&counts](int64_t task) {
        if (task % 7 == 3) throw std::runtime_error("task");
        ++(*counts)[static_cast<size_t>(task)];
      });
    } catch (const std::runtime_error&) {
      caught = true;
    }
  }
  std::vector<int> counts(50);
  team.For(50, [&counts](int64_t task) { ++counts[static_cast<size_t>(task)]; });
  for (const int count : counts) caught = caught && count == 1;
  return caught;
}

}  // namespace

int main() {
  for (int64_t threads : {0, 1, 2, 5})
    for (int repeat = 0; repeat < 15; ++repeat) {
      xla::ffi::ThreadPool pool(threads);
      if (!Throws(pool)) {
        std::fprintf(stderr, "%d threads: the exception of a task was lost\n", static_cast<int>(threads));
        return 1;
      }
    }
  int wrong = 0;
  for (const bool full : {false, true}) {
    for (const int64_t threads : {0, 1, 2, 5}) {
      {
        ThreadPool pool(threads, full);
        wrong += Check(Unused(pool), "unused", threads, 0);
      }
      for (const int64_t tasks : {0, 1, 2, 3, 8, 100})
        for (int repeat = 0; repeat < 8; ++repeat) {
          ThreadPool pool(threads, full);
          wrong += Check(Loops(pool, tasks, 1, true) && Loops(pool, tasks, 7, repeat % 2), "loops", threads, tasks);
          wrong += Check(Chain(pool, tasks, 50 + repeat), "chain", threads, tasks);
        }
      ThreadPool pool(threads, full);
      wrong += Check(Waiting(pool), "waiting", threads, 50);
      wrong += Check(Nested(pool), "nested", threads, 9);
    }
  }
  ThreadPool pool(2);
  wrong += Check(Many(pool), "many", 2, 3);
  return wrong == 0 ? 0 : 1;
}
