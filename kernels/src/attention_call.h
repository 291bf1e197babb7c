// A call of cached attention, as plain pointers: rotate queries and keys, append keys and values, attend.
#pragma once

#include <cstdint>
#include <string>

#include "linear_call.h"
#include "ops.h"
#include "parallel.h"

namespace precast {

struct AttentionShape {
  int64_t R, T, N, K, H, P, L, B, S;
};

// One of the caches: its rows, and the scale of each for int8.
struct CacheRows {
  CacheType type;
  char* rows;     // [L, B, K, S, H]
  float* scales;  // [L, B, K, S], or null

  void* Row(int64_t row, int64_t H) const {
    const int64_t size = type == CacheType::kFloat32 ? 4 : type == CacheType::kBfloat16 ? 2 : 1;
    return rows + row * H * size;
  }
  float* Scale(int64_t row) const { return scales == nullptr ? nullptr : scales + row; }
};

struct AttentionCall {
  AttentionShape d;
  const float *q, *k, *v, *cos, *sin;
  CacheRows keys, values;
  int64_t layer;
  const int32_t *slots, *starts, *lengths;
  float* out;
  float scale, soft_cap;
  int64_t window;

  // The cache row of place 0; position p stands at place p mod S.
  int64_t CacheRow(int64_t slot, int64_t k) const { return ((layer * d.B + slot) * d.K + k) * d.S; }
};

// What the numbers of a call say that cannot be run: a sequence outside the cache, two in one slot, a ring too short
// for what the call's tokens see. Empty if nothing.
std::string CheckAttention(const AttentionCall& call);

// Appends and attends; rows of `out` behind a sequence's length become zero.
void RunAttention(Team& team, const AttentionCall& call);

}  // namespace precast
