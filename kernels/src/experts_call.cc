// Runs a mixture expert by expert, each with all the rows that chose it, in ascending order: a row's sum then depends on
// who else is in the call by rounding alone (of int4 weights that of activations, which have fewer bits in many rows).
#include "experts_call.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

#include "ops.h"

namespace precast {
namespace {

// Rows that one task chooses experts for.
constexpr int64_t kChooseRows = 4;
// Numbers copied or added up below which sharing costs more time than it saves.
constexpr int64_t kAloneNumbers = 8 * 1024;
// Rows copied or added up by one task.
constexpr int64_t kMoveRows = 8;

constexpr float kNotChosen = -1.0f;  // no share is negative

// What lies between the steps of a call.
struct Room {
  float *normed, *gathered, *gated, *down;  // [M, D], [M, D], [M, F], [M, D]
  float* shares;                            // [experts, M], or kNotChosen
  int64_t* rows;                            // [M]: who chose the expert at hand
};

Room MakeRoom(Arena& arena, const ExpertsCall& c) {
  const int64_t each = c.rows * c.width;
  arena.Reset(4 * (3 * each + c.rows * (c.ff + c.experts)) + 8 * c.rows);
  return {arena.Take<float>(each),          arena.Take<float>(each), arena.Take<float>(c.rows * c.ff),
          arena.Take<float>(each),          arena.Take<float>(c.rows * c.experts), arena.Take<int64_t>(c.rows)};
}

// The softmax of n scores, NaN everywhere if one of them is NaN or infinity.
void Softmax(const float* scores, int64_t n, float* p) {
  float top = scores[0], total = 0.0f;
  for (int64_t e = 1; e < n; ++e) top = scores[e] > top ? scores[e] : top;
  for (int64_t e = 0; e < n; ++e) total += p[e] = std::exp(scores[e] - top);
  for (int64_t e = 0; e < n; ++e) p[e] /= total;
}

// Fills one column of `shares`. Of equals the first are chosen; so are the first `chosen` where all are NaN.
void Choose(const ExpertsCall& c, int64_t row, float* room, float* shares) {
  float *left = room, *kept = room + c.experts;
  Softmax(c.scores + row * c.experts, c.experts, left);
  std::fill(kept, kept + c.experts, kNotChosen);
  float sum = 0.0f;
  for (int64_t i = 0; i < c.chosen; ++i) {
    int64_t best = -1;
    for (int64_t e = 0; e < c.experts; ++e)
      if (kept[e] == kNotChosen && (best < 0 || left[e] > left[best])) best = e;
    sum += kept[best] = left[best];
  }
  for (int64_t e = 0; e < c.experts; ++e)
    shares[e * c.rows + row] = c.renormalised && kept[e] != kNotChosen ? kept[e] / sum : kept[e];
}

// The rows that chose an expert, ascending; returns how many.
int64_t RowsOf(const float* shares, int64_t rows, int64_t* found) {
  int64_t n = 0;
  for (int64_t r = 0; r < rows; ++r)
    if (shares[r] != kNotChosen) found[n++] = r;
  return n;
}

// Calls `body` with every row below n.
template <typename Body>
void ForRows(Team& team, const ExpertsCall& c, int64_t n, const Body& body) {
  For(team, n * c.width < kAloneNumbers, (n + kMoveRows - 1) / kMoveRows, [&](int64_t task) {
    for (int64_t r = task * kMoveRows; r < std::min(n, (task + 1) * kMoveRows); ++r) body(r);
  });
}

// One expert, with n rows: room.down = down(gate(x g^T) * (x u^T)).
void RunExpert(Team& team, Arena& linear, const ExpertsCall& c, const Room& room, int64_t expert, const float* x,
               int64_t n) {
  const int64_t at = c.first + expert;
  RunLinear(team, linear, {n, c.width, x, nullptr, 0.0f, nullptr, c.gate,
                           {{c.gates.At(at), nullptr, room.gated}, {c.ups.At(at), nullptr, nullptr}}});
  RunLinear(team, linear,
            {n, c.ff, room.gated, nullptr, 0.0f, nullptr, Gate::kNone, {{c.downs.At(at), nullptr, room.down}}});
}

}  // namespace

void RunExperts(Team& team, Arena& linear, Arena& own, const ExpertsCall& c) {
  const LinearOps& ops = CurrentOps().linear;
  const Room room = MakeRoom(own, c);
  const int64_t D = c.width;
  const float* x = c.norm == nullptr ? c.x : room.normed;
  ForRows(team, c, c.rows, [&](int64_t r) {
    if (c.norm != nullptr) ops.normalize(c.x + r * D, c.norm, nullptr, c.eps, D, room.normed + r * D);
    std::fill(c.y + r * D, c.y + (r + 1) * D, 0.0f);
  });
  const int64_t tasks = (c.rows + kChooseRows - 1) / kChooseRows;
  For(team, c.rows * c.experts * c.chosen < kAloneNumbers, tasks, [&](int64_t task) {
    std::unique_ptr<float[]> memory(new float[static_cast<size_t>(2 * c.experts)]);
    for (int64_t r = task * kChooseRows; r < std::min(c.rows, (task + 1) * kChooseRows); ++r)
      Choose(c, r, memory.get(), room.shares);
  });
  for (int64_t expert = 0; expert < c.experts; ++expert) {
    const float* shares = room.shares + expert * c.rows;
    const int64_t n = RowsOf(shares, c.rows, room.rows);
    if (n == 0) continue;
    if (n < c.rows)
      ForRows(team, c, n, [&](int64_t i) {
        std::memcpy(room.gathered + i * D, x + room.rows[i] * D, static_cast<size_t>(D) * sizeof(float));
      });
    RunExpert(team, linear, c, room, expert, n < c.rows ? room.gathered : x, n);
    ForRows(team, c, n, [&](int64_t i) {
      const float share = shares[room.rows[i]], *from = room.down + i * D;
      float* to = c.y + room.rows[i] * D;
      for (int64_t d = 0; d < D; ++d) to[d] += share * from[d];
    });
  }
  if (c.residual != nullptr) ForRows(team, c, c.rows, [&](int64_t r) { ops.add(c.residual + r * D, D, c.y + r * D); });
}

}  // namespace precast
