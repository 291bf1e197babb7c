// A linear call, split into tasks: some prepare the rows of activations, then others stream the weights.
#include "linear_call.h"

#include <algorithm>

#include "ops.h"

namespace precast {
namespace {

// Bytes of weights that a task streams: large enough to hide the cost of taking a task, small enough to split evenly.
constexpr int64_t kFloatTaskBytes = 128 * 1024, kPackedTaskBytes = 32 * 1024;
// The outputs of a task with float weights are a multiple of this. It is a multiple of every kSides, so that panels are
// full, and of kPanel, for calls that gate float weights with packed ones.
constexpr int64_t kTaskOutputs = 48;
// Bytes of quantised activations that stay in the L2 cache while the panels stream past.
constexpr int64_t kRowBytes = 400 * 1024;
// With more rows than this, a panel is enough work for a task.
constexpr int64_t kFewRows = 12;
// Rows that one task prepares: few, so that all threads prepare the rows of a batch of decode steps.
constexpr int64_t kPrepareRows = 2;
// Rows of the residual to prefetch ahead. A task adds one or two cache lines of each row, a pattern that hardware
// prefetchers miss.
constexpr int64_t kResidualAhead = 12;
// The largest second product, in floats, that fits the buffer on the stack.
constexpr int64_t kStackFloats = 2048;

// Normalise the activations if the call has a norm, and quantise them if it has packed weights.
LinearRows Prepare(Team& team, const LinearOps& ops, Arena& arena, const LinearCall& c) {
  bool floats = false, wide = false, narrow = false;
  for (const LinearPart& part : c.parts) {
    floats |= part.weight.TakesFloats();
    wide |= part.weight.IsWide();
    narrow |= !part.weight.TakesFloats() && !part.weight.IsWide();
  }
  LinearRows rows = {.x = c.x, .in = c.in};
  if (c.norm == nullptr && !wide && !narrow) return rows;
  const int64_t pad = RoundUp(c.in, kGroup), groups = pad / kGroup;
  const int64_t tasks = (c.rows + kPrepareRows - 1) / kPrepareRows;
  arena.Reset(c.rows * (c.in * 4 + pad * 3 + (2 + 5 * groups) * 4));
  // If no product reads the normalised floats, one row for each task suffices.
  float* normed = c.norm == nullptr ? nullptr : arena.Take<float>((floats ? c.rows : tasks) * c.in);
  if (normed != nullptr && floats) rows.x = normed;
  QuantizedRows& to = rows.quantized;
  to.in_pad = pad;
  if (wide) {
    to.q = arena.Take<int16_t>(c.rows * pad);
    to.scale = arena.Take<float>(c.rows);
  }
  if (narrow) {
    to.bytes = arena.Take<int8_t>(c.rows * pad);
    to.unit = arena.Take<float>(c.rows);
    to.group_scale = arena.Take<float>(c.rows * groups);
    to.sums = arena.Take<float>(c.rows * groups);
    to.pair_sums = arena.Take<PairSums>(c.rows * groups);
  }
  team.For(tasks, [&](int64_t task) {
    const int64_t end = std::min(c.rows, (task + 1) * kPrepareRows);
    for (int64_t row = task * kPrepareRows; row < end; ++row) {
      const float* x = c.x + row * c.in;
      if (normed != nullptr) {
        float* to_row = normed + (floats ? row : task) * c.in;
        ops.normalize(x, c.norm, nullptr, c.eps, c.in, to_row);
        x = to_row;
      }
      if (wide || narrow) ops.quantize(x, c.in, row, to);
    }
  });
  return rows;
}

int64_t TaskOutputs(const Weight& w, int64_t in, int64_t rows) {
  if (!w.IsPacked()) {
    const int64_t row_bytes = std::max<int64_t>(in * (w.format == Format::kFloat32 ? 4 : 2), 1);
    return std::max(kTaskOutputs, kFloatTaskBytes / row_bytes / kTaskOutputs * kTaskOutputs);
  }
  if (rows > kFewRows) return kPanel;
  const int64_t panel_bytes = w.format == Format::kBlocks
                                  ? std::max(w.blocks->RecordBytes(RoundUp(in, kGroup) / kGroup), kBlockUnit)
                                  : RoundUp(in + 1, kGroup) * kPanel / (w.format == Format::kInt4 ? 2 : 1);
  return std::max<int64_t>(1, kPackedTaskBytes / panel_bytes) * kPanel;
}

// Return the number of rows that are multiplied with some weights before the next weights are read.
int64_t RowChunk(const LinearCall& c) {
  if (!c.parts[0].weight.IsPacked()) return std::max<int64_t>(c.rows, 1);
  return std::max<int64_t>(24, kRowBytes / (2 * RoundUp(c.in + 1, kGroup)) / 24 * 24);
}

// Compute outputs [from, from + outs) of one part, with bias, gate and residual.
void Compute(const LinearOps& ops, const LinearCall& c, const LinearRows& x, const LinearPart& part, int64_t from,
             int64_t outs) {
  const int64_t chunk = RowChunk(c), y_row = part.weight.outs;
  const bool gated = c.gate != Gate::kNone, multiplied = gated && c.parts.size() > 1;
  float few[kStackFloats];
  std::unique_ptr<float[]> many;
  float* up = few;
  if (multiplied && std::min(chunk, c.rows) * outs > kStackFloats) {
    many.reset(new float[static_cast<size_t>(std::min(chunk, c.rows) * outs)]);
    up = many.get();
  }
  for (int64_t row = 0; row < c.rows; row += chunk) {
    const int64_t rows = std::min(chunk, c.rows - row);
    float* y = part.y + row * y_row + from;
    ops.product(part.weight, x, row, rows, from, outs, y, y_row);
    if (multiplied) ops.product(c.parts[1].weight, x, row, rows, from, outs, up, outs);
    for (int64_t r = 0; r < rows; ++r) {
      if (part.bias != nullptr) ops.add(part.bias + from, outs, y + r * y_row);
      if (gated) {
        if (multiplied && c.parts[1].bias != nullptr) ops.add(c.parts[1].bias + from, outs, up + r * outs);
        ops.gate(c.gate, multiplied ? up + r * outs : nullptr, outs, y + r * y_row);
      }
      if (c.residual == nullptr) continue;
      const float* residual = c.residual + (row + r) * y_row + from;
      if (r + kResidualAhead < rows) __builtin_prefetch(residual + kResidualAhead * y_row);
      ops.add(residual, outs, y + r * y_row);
    }
  }
}

}  // namespace

void RunLinear(Team& team, Arena& arena, const LinearCall& c) {
  const LinearOps& ops = CurrentOps().linear;
  const LinearRows rows = Prepare(team, ops, arena, c);
  int64_t tasks = 0;
  for (size_t i = 0; i < c.results(); ++i) {
    const int64_t step = TaskOutputs(c.parts[i].weight, c.in, c.rows);
    tasks += (c.parts[i].weight.outs + step - 1) / step;
  }
  team.For(tasks, [&](int64_t task) {
    for (const LinearPart& part : c.parts) {
      const int64_t step = TaskOutputs(part.weight, c.in, c.rows), own = (part.weight.outs + step - 1) / step;
      if (task < own) return Compute(ops, c, rows, part, task * step, std::min(step, part.weight.outs - task * step));
      task -= own;
    }
  });
}

}  // namespace precast
