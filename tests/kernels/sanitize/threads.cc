// Loops over a pool whose threads come late, under a sanitizer: each task runs once, is over when the loop is, its
// writes are seen, and nothing of the loop is touched by a thread that comes when its memory is gone.
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <thread>
#include <vector>

#include "parallel.h"

namespace {

bool Loop(xla::ffi::ThreadPool& pool, int64_t tasks) {
  // On the heap, and freed at once: a late thread that touched it would be caught.
  auto counts = std::make_unique<std::vector<int>>(static_cast<size_t>(tasks));
  auto add = [&counts, tasks](int64_t task) {
    // The last ones take their time: some of them are still at work when no task is left to draw.
    if (task + 8 >= tasks) std::this_thread::sleep_for(std::chrono::microseconds(40 * (task % 3)));
    ++(*counts)[static_cast<size_t>(task)];
  };
  auto body = std::make_unique<decltype(add)>(add);
  precast::ParallelFor(pool, tasks, *body);
  body.reset();
  for (const int count : *counts)
    if (count != 1) return false;
  return true;
}

}  // namespace

int main() {
  for (int64_t threads : {0, 1, 2, 5}) {
    for (int64_t tasks : {0, 1, 2, 3, 8, 100}) {
      for (int repeat = 0; repeat < 15; ++repeat) {
        xla::ffi::ThreadPool pool(threads);
        for (int loops = 0; loops < 3; ++loops)
          if (!Loop(pool, tasks)) {
            std::fprintf(stderr, "%d threads, %d tasks: not each ran once\n", static_cast<int>(threads),
                         static_cast<int>(tasks));
            return 1;
          }
      }
    }
  }
}
