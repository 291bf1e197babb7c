// A normalisation, split into tasks of whole pieces.
#include "norm_call.h"

#include <algorithm>

#include "ops.h"

namespace precast {
namespace {

// Numbers that one task normalises.
constexpr int64_t kTaskNumbers = 4 * 1024;
// Below this many numbers, splitting the work costs more time than it saves.
constexpr int64_t kAloneNumbers = 8 * 1024;

}  // namespace

void RunNorm(Team& team, const NormCall& c) {
  const LinearOps& ops = CurrentOps().linear;
  const int64_t pieces = c.rows * (c.width / c.piece), each = std::max<int64_t>(1, kTaskNumbers / c.piece);
  For(team, pieces * c.piece < kAloneNumbers, (pieces + each - 1) / each, [&](int64_t task) {
    const int64_t end = std::min(pieces, (task + 1) * each);
    for (int64_t at = task * each * c.piece; at < end * c.piece; at += c.piece) {
      ops.normalize(c.x + at, c.weight, c.bias, c.eps, c.piece, c.y + at);
      if (c.residual != nullptr) ops.add(c.residual + at, c.piece, c.y + at);
    }
  });
}

}  // namespace precast
