// What every instruction set implements. Plain pointers and sizes: no XLA, no Python.
//
// Letters: R sequences in the call, T tokens of each, L layers, B slots, S cache capacity, N query heads,
// K key/value heads, G = N / K, H head dimension.
#pragma once

#include <cstdint>

namespace precast {

// One sequence and one key/value head of a cached attention call.
struct AttentionHead {
  const float* q;        // query of token 0 and of the head's first query head
  int64_t q_token;       // distance between tokens in q and in out
  const float* keys;     // [S, H] of this layer, slot and head
  const float* values;   // [S, H]
  int64_t group;         // G: consecutive query heads that share this head
  int64_t head_dim;      // H
  int64_t start;         // position of token 0; token t sees positions 0 .. start + t
  float scale;
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
  // y[r * y_row + o] = sum_i x[r * in + i] * w[o * in + i], for r < rows and o < outs.
  void (*matmul)(const float* x, int64_t rows, int64_t in, const float* w, int64_t outs, float* y,
                 int64_t y_row);
  // Fills `partial` for the span; `scratch` holds AttentionScratch() floats.
  void (*attention)(const AttentionHead& head, const AttentionSpan& span, const AttentionPartial& partial,
                    float* scratch);
};

// Positions scored at a time; a tile of scores and of keys stays in the first-level cache.
constexpr int64_t kTile = 64;

constexpr int64_t AttentionScratch(int64_t rows, int64_t head_dim) { return rows * (head_dim + kTile); }

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
