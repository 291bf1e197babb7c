// A call of attention, split into tasks: blocks of tokens, or, for few tokens, spans of positions.
#include "attention_call.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

namespace precast {
namespace {

// Query rows (tokens times group) of a task, which share one prepared tile of keys.
constexpr int64_t kAttentionRows = 48;
// Below these amounts of work, about a microsecond of one thread, splitting costs more time than it saves. The units
// are numbers to append, numbers in the queries times positions, and numbers to merge.
constexpr int64_t kAloneAppend = 4 * 1024;
constexpr int64_t kAloneAttend = 16 * 1024;
constexpr int64_t kAloneMerge = 16 * 1024;

// The work of a sequence. For each key/value head, its tokens are split into `blocks` blocks of `block` tokens. If
// there is only one block, as in a decode step, its positions are split into `spans` spans of a tile each, because one
// block per head is too little work for many threads. `first` is the first position that the sequence sees.
struct Sequence {
  int64_t r, slot, start, length;
  int64_t block, blocks = 0;
  int64_t first = 0, spans = 1;
  int64_t first_task, first_float;

  int64_t end() const { return start + length; }
};

std::string SequenceText(const AttentionCall& c, int64_t r) {
  return "sequence " + std::to_string(r) + " in slot " + std::to_string(c.slots[r]) + " with start " +
         std::to_string(c.starts[r]) + " and length " + std::to_string(c.lengths[r]);
}

// The sequences that have tokens, each split into tasks.
std::vector<Sequence> Plan(const AttentionCall& c) {
  const AttentionShape& d = c.d;
  const int64_t group = d.N / d.K, block = std::max<int64_t>(1, kAttentionRows / group);
  std::vector<Sequence> plan;
  int64_t task = 0, floats = 0;
  for (int64_t r = 0; r < d.R; ++r) {
    Sequence s = {.r = r,
                  .slot = c.slots[r],
                  .start = c.starts[r],
                  .length = c.lengths[r],
                  .block = block,
                  .first_task = task,
                  .first_float = floats};
    if (s.length == 0) continue;
    s.blocks = (s.length + block - 1) / block;
    s.block = std::min(block, s.length);
    if (c.window > 0) s.first = std::max<int64_t>(0, s.start + 1 - c.window);
    if (s.blocks == 1) s.spans = (s.end() - 1) / kTile - s.first / kTile + 1;
    task += d.K * s.blocks * s.spans;
    if (s.spans > 1) floats += d.K * s.spans * s.block * group * (d.H + 2);
    plan.push_back(s);
  }
  return plan;
}

AttentionPartial PartialAt(float* at, int64_t rows, int64_t H) {
  return {.out = at, .peak = at + rows * H, .mass = at + rows * (H + 1)};
}

void Append(const AttentionCall& c, const Ops& ops, const Sequence& s, int64_t k, bool keys, float* scratch) {
  const AttentionShape& d = c.d;
  const CacheRows& cache = keys ? c.keys : c.values;
  // Rows that do not fit before the ring's end continue at its beginning.
  for (int64_t token = 0, n; token < s.length; token += n) {
    const int64_t place = (s.start + token) % d.S, row = c.CacheRow(s.slot, k) + place;
    n = std::min(s.length - token, d.S - place);
    const int64_t at = s.r * d.T + token;
    ops.store_rows({.x = (keys ? c.k : c.v) + (at * d.K + k) * d.H,
                    .x_token = d.K * d.H,
                    .cos = c.cos + at * d.P,
                    .sin = c.sin + at * d.P,
                    .pairs = keys ? d.P : 0,
                    .tokens = n,
                    .head_dim = d.H,
                    .type = cache.type,
                    .rows = cache.Row(row, d.H),
                    .scales = cache.Scale(row)},
                   scratch);
  }
}

// Run one task: a block of tokens of one key/value head against all positions that they see, or against one span of
// these positions. Write the answers immediately if the sequence has only one span.
void AttendTask(const AttentionCall& c, const Ops& ops, const Sequence& s, int64_t task, float* partials) {
  const AttentionShape& d = c.d;
  const int64_t group = d.N / d.K, unit = task / s.spans, span = task % s.spans, k = unit % d.K;
  // The last tokens see most positions and run first, so that the other threads do not wait for them at the end.
  const int64_t token = (s.blocks - 1 - unit / d.K) * s.block, tokens = std::min(s.block, s.length - token);
  const int64_t rows = tokens * group, angles = s.r * d.T * d.P, row = c.CacheRow(s.slot, k);
  const int64_t query = (s.r * d.T * d.N + k * group) * d.H;
  const AttentionHead head = {.q = c.q + query,
                              .q_token = d.N * d.H,
                              .cos = c.cos + angles,
                              .sin = c.sin + angles,
                              .pairs = d.P,
                              .type = c.keys.type,
                              .keys = c.keys.Row(row, d.H),
                              .values = c.values.Row(row, d.H),
                              .key_scales = c.keys.Scale(row),
                              .value_scales = c.values.Scale(row),
                              .group = group,
                              .head_dim = d.H,
                              .places = d.S,
                              .start = s.start,
                              .window = c.window,
                              .scale = c.scale,
                              .soft_cap = c.soft_cap};
  const int64_t from = (s.first / kTile + span) * kTile, partial_floats = rows * (d.H + 2);
  const int64_t own = s.spans > 1 ? 0 : partial_floats;
  std::unique_ptr<float[]> scratch(new float[static_cast<size_t>(AttentionScratch(rows, d.H) + own)]);
  float* at = s.spans > 1 ? partials + s.first_float + (k * s.spans + span) * partial_floats : scratch.get();
  const AttentionPartial partial = PartialAt(at, rows, d.H);
  const AttentionSpan positions = {
      .token = token, .tokens = tokens, .from = from, .to = s.spans > 1 ? from + kTile : s.end()};
  ops.attention(head, positions, partial, scratch.get() + own);
  if (s.spans == 1) ops.merge_spans(partial, 0, 1, rows, group, d.H, c.out + query + token * d.N * d.H, d.N * d.H);
}

void MergeHead(const AttentionCall& c, const Ops& ops, const Sequence& s, int64_t k, float* partials) {
  const AttentionShape& d = c.d;
  const int64_t group = d.N / d.K, rows = s.length * group, stride = rows * (d.H + 2);
  ops.merge_spans(PartialAt(partials + s.first_float + k * s.spans * stride, rows, d.H), stride, s.spans, rows, group,
                  d.H, c.out + (s.r * d.T * d.N + k * group) * d.H, d.N * d.H);
}

}  // namespace

std::string CheckAttention(const AttentionCall& c) {
  const AttentionShape& d = c.d;
  if (c.layer < 0 || c.layer >= d.L)
    return "attention: no layer " + std::to_string(c.layer) + " in caches of " + std::to_string(d.L) + " layers";
  std::vector<char> used(static_cast<size_t>(d.B), 0);
  for (int64_t r = 0; r < d.R; ++r) {
    const int64_t slot = c.slots[r], start = c.starts[r], length = c.lengths[r];
    if (length == 0) continue;
    if (slot < 0 || slot >= d.B || start < 0 || length < 0 || length > d.T || (c.window == 0 && start + length > d.S))
      return "attention: " + SequenceText(c, r) + " does not fit " + std::to_string(d.B) + " slots of " +
             std::to_string(d.S) + " positions and " + std::to_string(d.T) + " tokens";
    // The last token of the call must not overwrite a position that the first token sees.
    if (start + length > d.S && c.window > d.S - length + 1)
      return "attention: " + SequenceText(c, r) + " does not fit a ring of " + std::to_string(d.S) +
             " positions with a window of " + std::to_string(c.window);
    if (used[static_cast<size_t>(slot)]++) return "attention: two sequences in slot " + std::to_string(slot);
  }
  if (!(c.soft_cap >= 0.0f) || std::isinf(c.soft_cap) || c.window < 0)
    return "attention: expected a window and a finite soft_cap of at least 0, found " + std::to_string(c.window) +
           " and " + std::to_string(c.soft_cap);
  return "";
}

void RunAttention(Team& team, const AttentionCall& c) {
  const AttentionShape& d = c.d;
  for (int64_t r = 0; r < d.R; ++r) {
    float* row = c.out + r * d.T * d.N * d.H;
    std::fill(row + c.lengths[r] * d.N * d.H, row + d.T * d.N * d.H, 0.0f);
  }
  const std::vector<Sequence> plan = Plan(c);
  if (plan.empty()) return;
  const Ops& ops = CurrentOps();
  int64_t appended = 0, attended = 0;
  for (const Sequence& s : plan) {
    appended += 2 * s.length * d.K * d.H;
    attended += s.length * d.N * d.H * (s.end() - s.first);
  }
  const int64_t stores = static_cast<int64_t>(plan.size()) * d.K * 2;
  For(team, appended < kAloneAppend, stores, [&](int64_t i) {
    std::unique_ptr<float[]> scratch(new float[static_cast<size_t>(d.H)]);
    Append(c, ops, plan[static_cast<size_t>(i / 2 / d.K)], i / 2 % d.K, i % 2 == 0, scratch.get());
  });
  const Sequence& last = plan.back();
  const int64_t tasks = last.first_task + d.K * last.blocks * last.spans;
  const int64_t floats =
      last.first_float + (last.spans > 1 ? d.K * last.spans * last.length * d.N / d.K * (d.H + 2) : 0);
  std::unique_ptr<float[]> partials(new float[static_cast<size_t>(floats)]);
  For(team, attended < kAloneAttend, tasks, [&](int64_t task) {
    size_t i = plan.size() - 1;
    while (task < plan[i].first_task) --i;
    AttendTask(c, ops, plan[i], task - plan[i].first_task, partials.get());
  });
  if (floats == 0) return;
  For(team, floats < kAloneMerge, static_cast<int64_t>(plan.size()) * d.K, [&](int64_t i) {
    const Sequence& s = plan[static_cast<size_t>(i / d.K)];
    if (s.spans > 1) MergeHead(c, ops, s, i % d.K, partials.get());
  });
}

}  // namespace precast
