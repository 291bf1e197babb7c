// Runs the experts of a mixture in ascending order, each on all the rows that chose it. The bits of a row's sum
// therefore do not depend on the other rows of the call.
#include "experts_call.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

#include "ops.h"

namespace precast {
namespace {

// Rows for which one task chooses experts.
constexpr int64_t kChooseRows = 4;
// Below this many numbers to copy or add, splitting the work costs more time than it saves.
constexpr int64_t kAloneNumbers = 8 * 1024;
// Rows that one task copies or adds.
constexpr int64_t kMoveRows = 8;

constexpr float kNotChosen = -1.0f;  // shares are never negative

// Intermediate arrays of a call.
struct Scratch {
  float *normed, *gathered, *gated, *down;  // [M, D], [M, D], [M, F], [M, D]
  float* shares;                            // [experts, M], kNotChosen if a row did not choose the expert
  int64_t* rows;                            // [M]: rows that chose the current expert
};

Scratch MakeScratch(Arena& arena, const ExpertsCall& c) {
  const int64_t size = c.rows * c.width;
  arena.Reset(4 * (3 * size + c.rows * (c.ff + c.experts)) + 8 * c.rows);
  return {.normed = arena.Take<float>(size),
          .gathered = arena.Take<float>(size),
          .gated = arena.Take<float>(c.rows * c.ff),
          .down = arena.Take<float>(size),
          .shares = arena.Take<float>(c.rows * c.experts),
          .rows = arena.Take<int64_t>(c.rows)};
}

// The softmax of n scores; all NaN if any score is NaN or infinite.
void Softmax(const float* scores, int64_t n, float* p) {
  float top = scores[0], total = 0.0f;
  for (int64_t e = 1; e < n; ++e) top = scores[e] > top ? scores[e] : top;
  for (int64_t e = 0; e < n; ++e) total += p[e] = std::exp(scores[e] - top);
  for (int64_t e = 0; e < n; ++e) p[e] /= total;
}

// Fill one column of `shares`. The first of equal scores wins; if all are NaN, the first `chosen` experts win.
// `scratch` has room for 2 * experts floats.
void Choose(const ExpertsCall& c, int64_t row, float* scratch, float* shares) {
  float *all = scratch, *kept = scratch + c.experts;
  Softmax(c.scores + row * c.experts, c.experts, all);
  std::fill(kept, kept + c.experts, kNotChosen);
  float sum = 0.0f;
  for (int64_t i = 0; i < c.chosen; ++i) {
    int64_t best = -1;
    for (int64_t e = 0; e < c.experts; ++e)
      if (kept[e] == kNotChosen && (best < 0 || all[e] > all[best])) best = e;
    sum += kept[best] = all[best];
  }
  for (int64_t e = 0; e < c.experts; ++e)
    shares[e * c.rows + row] = c.renormalised && kept[e] != kNotChosen ? kept[e] / sum : kept[e];
}

// Write the rows that chose an expert, in ascending order, and return their number.
int64_t RowsOf(const float* shares, int64_t rows, int64_t* found) {
  int64_t n = 0;
  for (int64_t r = 0; r < rows; ++r)
    if (shares[r] != kNotChosen) found[n++] = r;
  return n;
}

// Call `body` with each row below n.
template <typename Body>
void ForRows(Team& team, const ExpertsCall& c, int64_t n, const Body& body) {
  For(team, n * c.width < kAloneNumbers, (n + kMoveRows - 1) / kMoveRows, [&](int64_t task) {
    for (int64_t r = task * kMoveRows; r < std::min(n, (task + 1) * kMoveRows); ++r) body(r);
  });
}

// Run one expert on n rows: scratch.down = down(gate(x g^T) * (x u^T)).
void RunExpert(Team& team, Arena& linear, const ExpertsCall& c, const Scratch& scratch, int64_t expert, const float* x,
               int64_t n) {
  const int64_t at = c.first + expert;
  RunLinear(team, linear,
            {.rows = n,
             .in = c.width,
             .x = x,
             .gate = c.gate,
             .parts = {{.weight = c.gates.At(at), .y = scratch.gated}, {.weight = c.ups.At(at)}}});
  RunLinear(team, linear,
            {.rows = n, .in = c.ff, .x = scratch.gated, .parts = {{.weight = c.downs.At(at), .y = scratch.down}}});
}

}  // namespace

void RunExperts(Team& team, Arena& linear, Arena& own, const ExpertsCall& c) {
  const LinearOps& ops = CurrentOps().linear;
  const Scratch scratch = MakeScratch(own, c);
  const int64_t D = c.width;
  const float* x = c.norm == nullptr ? c.x : scratch.normed;
  ForRows(team, c, c.rows, [&](int64_t r) {
    if (c.norm != nullptr) ops.normalize(c.x + r * D, c.norm, nullptr, c.eps, D, scratch.normed + r * D);
    std::fill(c.y + r * D, c.y + (r + 1) * D, 0.0f);
  });
  const int64_t tasks = (c.rows + kChooseRows - 1) / kChooseRows;
  For(team, c.rows * c.experts * c.chosen < kAloneNumbers, tasks, [&](int64_t task) {
    std::unique_ptr<float[]> memory(new float[static_cast<size_t>(2 * c.experts)]);
    for (int64_t r = task * kChooseRows; r < std::min(c.rows, (task + 1) * kChooseRows); ++r)
      Choose(c, r, memory.get(), scratch.shares);
  });
  for (int64_t expert = 0; expert < c.experts; ++expert) {
    const float* shares = scratch.shares + expert * c.rows;
    const int64_t n = RowsOf(shares, c.rows, scratch.rows);
    if (n == 0) continue;
    if (n < c.rows)
      ForRows(team, c, n, [&](int64_t i) {
        std::memcpy(scratch.gathered + i * D, x + scratch.rows[i] * D, static_cast<size_t>(D) * sizeof(float));
      });
    RunExpert(team, linear, c, scratch, expert, n < c.rows ? scratch.gathered : x, n);
    ForRows(team, c, n, [&](int64_t i) {
      const float share = shares[scratch.rows[i]], *from = scratch.down + i * D;
      float* to = c.y + scratch.rows[i] * D;
      for (int64_t d = 0; d < D; ++d) to[d] += share * from[d];
    });
  }
  if (c.residual != nullptr) ForRows(team, c, c.rows, [&](int64_t r) { ops.add(c.residual + r * D, D, c.y + r * D); });
}

}  // namespace precast
