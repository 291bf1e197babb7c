// What every instruction set implements. Plain pointers and sizes: no XLA, no Python.
//
// Letters: R sequences in the call, T tokens of each, L layers, B slots, S cache capacity, N query heads,
// K key/value heads, G = N / K, H head dimension.
#pragma once

#include <cstdint>

#include "linear.h"

namespace precast {

// How keys and values are stored; int8 rows have a scale each.
enum class CacheType { kFloat32, kBfloat16, kInt8 };

// Tokens of one sequence and one key/value head on their way into the cache.
struct CacheWrite {
  const float* x;           // the first token's [H]
  int64_t x_token;          // distance between tokens
  const float *cos, *sin;   // [tokens, pairs]
  int64_t pairs;            // rotary pairs: x[i] with x[pairs + i]; none for values
  int64_t tokens, head_dim;
  CacheType type;
  void* rows;               // [tokens, H] in the cache
  float* scales;            // [tokens] for int8
};

// One sequence and one key/value head of a cached attention call.
struct AttentionHead {
  const float* q;           // query of token 0 and of the head's first query head, not yet rotated
  int64_t q_token;          // distance between tokens in q
  const float *cos, *sin;   // [T, pairs] of this sequence
  int64_t pairs;
  CacheType type;
  const void *keys, *values;                // [S, H] of this layer, slot and head, a ring where there is a window
  const float *key_scales, *value_scales;   // [S] for int8, else null
  int64_t group;            // G: consecutive query heads that share this head
  int64_t head_dim;         // H
  int64_t places;           // S: position p stands at place p mod S
  int64_t start;            // position of token 0; token t sees positions 0 .. start + t
  int64_t window;           // of those, if not 0, the last `window`
  float scale;
  float soft_cap;           // if not 0, scores become soft_cap * tanh(score / soft_cap)
};

// A rectangle of one head's work: tokens [token, token + tokens) against positions [from, to).
struct AttentionSpan {
  int64_t token, tokens;
  int64_t from, to;
};

// Softmax over a span, not yet divided: out = sum(exp(s - peak) v), mass = sum(exp(s - peak)).
struct AttentionPartial {
  float* out;    // [tokens * G, H]
  float* peak;   // [tokens * G]
  float* mass;   // [tokens * G]
};

struct Ops {
  const char* name;
  LinearOps linear;
  // Rotates and stores; `scratch` holds H floats.
  void (*store_rows)(const CacheWrite& write, float* scratch);
  // Fills `partial` for what the span's tokens see of its positions; `scratch` holds AttentionScratch() floats.
  void (*attention)(const AttentionHead& head, AttentionSpan span, const AttentionPartial& partial, float* scratch);
  // Writes the answers of `rows` queries from `spans` partials, each `stride` floats behind the one before; tokens
  // are `out_token` apart.
  void (*merge_spans)(const AttentionPartial& partial, int64_t stride, int64_t spans, int64_t rows, int64_t group,
                      int64_t head_dim, float* out, int64_t out_token);
  // The index of the first of the largest of n >= 1 numbers; NaN is larger than any.
  int64_t (*argmax)(const float* x, int64_t n);
};

// Positions scored at a time for many query rows: a tile of scores and of keys stays in the first-level cache.
constexpr int64_t kTile = 64;
// For few query rows, which read a tile once and in order.
constexpr int64_t kFewTile = 256;
constexpr int64_t kFewQueries = 8;

// Queries and scores; for many rows also the tile's keys and values as floats.
constexpr int64_t AttentionScratch(int64_t rows, int64_t head_dim) {
  return rows <= kFewQueries ? rows * (head_dim + kFewTile)
                             : rows * (head_dim + kTile) + 2 * kTile * head_dim;
}

const Ops& PortableOps();
#if defined(__x86_64__)
const Ops& Avx2Ops();
const Ops& Avx512Ops();
#endif

// The implementation in use: the best this CPU has, or the one forced by name. Null when `name` is unknown or
// this CPU lacks it.
const Ops& CurrentOps();
const Ops* FindOps(const char* name);
void ForceOps(const Ops* ops);

}  // namespace precast
