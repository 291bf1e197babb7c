// Cached attention on plain pointers: rotate queries and keys, append keys and values to the cache, and attend.
#pragma once

#include <cstdint>
#include <string>

#include "linear_call.h"
#include "ops.h"
#include "parallel.h"

namespace precast {

// ops.h explains the letters; P is the number of rotary pairs.
struct AttentionShape {
  int64_t R = 0, T = 0, N = 0, K = 0, H = 0, P = 0, L = 0, B = 0, S = 0;
};

// The keys or the values of a cache.
struct CacheRows {
  CacheType type = CacheType::kFloat32;
  char* rows = nullptr;     // [L, B, K, S, H]
  float* scales = nullptr;  // [L, B, K, S] for int8, else null

  void* Row(int64_t row, int64_t H) const {
    const int64_t size = type == CacheType::kFloat32 ? 4 : type == CacheType::kBfloat16 ? 2 : 1;
    return rows + row * H * size;
  }
  float* Scale(int64_t row) const { return scales == nullptr ? nullptr : scales + row; }
};

struct AttentionCall {
  AttentionShape d = {};
  const float* q = nullptr;                    // [R, T, N, H]
  const float *k = nullptr, *v = nullptr;      // [R, T, K, H]
  const float *cos = nullptr, *sin = nullptr;  // [R, T, P]
  CacheRows keys = {}, values = {};
  int64_t layer = 0;
  const int32_t *slots = nullptr, *starts = nullptr, *lengths = nullptr;  // [R]
  float* out = nullptr;                                                   // [R, T, N, H]
  float scale = 0.0f, soft_cap = 0.0f;
  int64_t window = 0;

  // The index of the cache row for place 0; position p is at place p mod S.
  int64_t CacheRow(int64_t slot, int64_t k) const { return ((layer * d.B + slot) * d.K + k) * d.S; }
};

// Return the reason why a call cannot run, or "" if it can. The reason is a layer or a sequence outside the cache, two
// sequences in one slot, a ring buffer too short for the window of the call's tokens, or an invalid window or cap.
std::string CheckAttention(const AttentionCall& call);

// Append keys and values to the cache, and attend; rows of `out` beyond a sequence's length become zero.
void RunAttention(Team& team, const AttentionCall& call);

}  // namespace precast
