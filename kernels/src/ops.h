// The operations that every instruction set implements, on plain pointers and sizes, without XLA or Python.
//
// Letters: R sequences in the call, T tokens of each, L layers, B slots, S positions of the cache, N query heads,
// K key/value heads, G = N / K, H head dimension.
#pragma once

#include <cstdint>

#include "linear.h"

namespace precast {

// The type of stored keys and values; each int8 row has a scale.
enum class CacheType { kFloat32, kBfloat16, kInt8 };

// Tokens of one sequence and one key/value head to store in the cache.
struct CacheWrite {
  const float* x;                              // [H] of the first token
  int64_t x_token = 0;                         // stride of tokens
  const float *cos = nullptr, *sin = nullptr;  // [tokens, pairs]
  int64_t pairs = 0;                           // rotary pairs: x[i] with x[pairs + i]; 0 for values
  int64_t tokens, head_dim;
  CacheType type;
  void* rows;               // [tokens, H] in the cache
  float* scales = nullptr;  // [tokens] for int8
};

// One sequence and one key/value head of a cached attention call.
struct AttentionHead {
  const float* q;          // token 0 and the head's first query head, not yet rotated
  int64_t q_token;         // stride of tokens in q
  const float *cos, *sin;  // [T, pairs] of this sequence
  int64_t pairs;
  CacheType type;
  const void *keys, *values;               // [S, H] of this layer, slot and head; a ring if there is a window
  const float *key_scales, *value_scales;  // [S] for int8, else null
  int64_t group;                           // G: consecutive query heads that share this head
  int64_t head_dim;                        // H
  int64_t places;                          // S: position p is at place p mod S
  int64_t start;                           // position of token 0; token t sees positions 0 .. start + t
  int64_t window;                          // if not 0, only the last `window` of these positions
  float scale;
  float soft_cap;  // if not 0, scores become soft_cap * tanh(score / soft_cap)
};

// A rectangle of one head's work: tokens [token, token + tokens) against positions [from, to).
struct AttentionSpan {
  int64_t token, tokens;
  int64_t from, to;
};

// An unnormalised softmax over a span: out = sum(exp(s - peak) v), mass = sum(exp(s - peak)). The mass is 0 for a row
// that sees no position of the span.
struct AttentionPartial {
  float* out;   // [tokens * G, H]
  float* peak;  // [tokens * G]
  float* mass;  // [tokens * G]
};

struct Ops {
  const char* name;
  LinearOps linear;
  // Rotate the rows of `write` and store them in the cache; `scratch` has room for H floats.
  void (*store_rows)(const CacheWrite& write, float* scratch);
  // Fill `partial` for the positions of the span that its tokens see, tile after tile; `scratch` has room for
  // AttentionScratch() floats.
  void (*attention)(const AttentionHead& head, AttentionSpan span, const AttentionPartial& partial, float* scratch);
  // Merge `spans` partials, each of `rows` queries, into the first, and write the answers. The partials are `stride`
  // floats apart; the tokens of `out` are `out_token` floats apart.
  void (*merge_spans)(const AttentionPartial& partial, int64_t stride, int64_t spans, int64_t rows, int64_t group,
                      int64_t head_dim, float* out, int64_t out_token);
  // The index of the first largest of n >= 1 numbers; NaN counts as larger than any number.
  int64_t (*argmax)(const float* x, int64_t n);
};

// The number of positions in a tile. Each tile has its own softmax and begins at a multiple of kTile.
constexpr int64_t kTile = 128;
// Up to this many query rows read values in their stored type; for more rows, the values are widened first.
constexpr int64_t kFewQueries = 8;
// The maximum number of positions whose keys are transposed together.
constexpr int64_t kMostColumns = 64;

// The number of floats for queries, scores, scales, transposed keys, widened values, and the softmax of a tile.
constexpr int64_t AttentionScratch(int64_t rows, int64_t head_dim) {
  return rows * (2 * head_dim + kTile + 2) + kTile + (kMostColumns + kTile) * head_dim;
}

const Ops& PortableOps();
#if defined(__x86_64__)
const Ops& Avx2Ops();
const Ops& Avx512Ops();
#endif

// The implementation in use: the forced one or, by default, the widest that this CPU supports.
const Ops& CurrentOps();
// The implementation of this name; null if the name is unknown or this CPU lacks the instruction set.
const Ops* FindOps(const char* name);
// Force an implementation; null restores the widest.
void ForceOps(const Ops* ops);

}  // namespace precast
