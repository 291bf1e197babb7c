// Weights in any format, and rows of activations prepared for them.
#pragma once

#include <cstdint>
#include <cstring>

#include "block_formats.h"

namespace precast {

// Packed weights interleave kPanel outputs. Each group of kGroup inputs of an output shares a scale.
constexpr int kPanel = 16;
constexpr int kGroup = 32;

enum class Format { kFloat32, kBfloat16, kInt8, kInt4, kBlocks };

// The weights of one layer. Float formats: values [outs, in]. Packed formats, with P = outs / kPanel and I = in, both
// rounded up and padded with zeros: int8 values [P, I / 2, kPanel, 2]; int4 values [P, I / 8, kPanel, 4], where the low
// nibbles store the first four of eight inputs; scale and minimum [P, I / kGroup, kPanel] in half precision. Symmetric
// int4 weights store no minimum; their minimum is -8 times the scale. Block formats: one record for each panel.
struct Weight {
  Format format;
  const BlockFormat* blocks = nullptr;  // for kBlocks, else null
  const void* values = nullptr;
  const uint16_t* scale = nullptr;    // int8 and int4
  const uint16_t* minimum = nullptr;  // int4: added to scale times value; null if symmetric
  int64_t outs;

  bool IsPacked() const { return format != Format::kFloat32 && format != Format::kBfloat16; }
  // True if the weights multiply activations as floats, without quantising them.
  bool TakesFloats() const { return !IsPacked() || (format == Format::kBlocks && blocks->HasFloatCodes()); }
  // True if activations are quantised to 16 bits.
  bool IsWide() const { return format == Format::kInt8 || (format == Format::kBlocks && blocks->IsWide()); }
};

// Sums of a group's bytes, for products with codes that represent their difference to a constant. Every four inputs are
// two pairs. A pair of sums adds the first pairs, and the second pairs: of the first half of the group, of the second
// half, and of the whole group.
struct PairSums {
  int16_t sums[3][2];
};

// Quantised activations. With 8-bit weights, activations have 16 bits and one scale per row: `q` and `scale`. With
// narrower weights, they have 8 bits and one scale per group, which halves the number of products: the other arrays.
// Arrays of a kind that no weight of the call needs are null.
struct QuantizedRows {
  int16_t* q = nullptr;           // [rows, in_pad]
  float* scale = nullptr;         // [rows]
  int8_t* bytes = nullptr;        // [rows, in_pad]
  float* unit = nullptr;          // [rows], of the scales: 1, or a power of 2 if activations are huge
  float* group_scale = nullptr;   // [rows, in_pad / kGroup], in this unit
  float* sums = nullptr;          // [rows, in_pad / kGroup]: sum of a group's bytes times the group's scale
  PairSums* pair_sums = nullptr;  // [rows, in_pad / kGroup]
  int64_t in_pad = 0;
};

struct LinearRows {
  const float* x = nullptr;  // [rows, in], for weights that take floats
  int64_t in;
  QuantizedRows quantized = {};  // for all other weights
};

enum class Gate { kNone, kSilu, kGeluTanh };

// The bits of the half-precision number that is 1/256 of a number in e4m3 (also if it is subnormal). A NaN becomes
// 480/256.
constexpr int kE4M3Unit = 256;
inline uint16_t HalfOfE4M3(uint8_t bits) { return static_cast<uint16_t>((bits & 0x80) << 8 | (bits & 0x7f) << 7); }

// Convert IEEE half precision to single. Convert a subnormal half from its integer, because XLA's threads flush
// subnormal floats to zero.
inline float HalfToFloat(uint16_t half) {
  const uint32_t exponent = (half >> 10) & 31, fraction = half & 0x3ff;
  float value;
  if (exponent == 0) {
    value = static_cast<float>(fraction) * 0x1p-24f;
  } else {
    const uint32_t bits = (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
    std::memcpy(&value, &bits, sizeof value);
  }
  return half & 0x8000 ? -value : value;
}

struct LinearOps {
  // RMSNorm of n elements: y = x / sqrt(mean(x^2) + eps) * weight. With a bias it is LayerNorm, which first subtracts
  // the mean from x and adds the bias at the end.
  void (*normalize)(const float* x, const float* weight, const float* bias, float eps, int64_t n, float* y);
  // Quantise `in` floats into row `row` of the kinds of arrays of `to` that are not null.
  void (*quantize)(const float* x, int64_t in, int64_t row, const QuantizedRows& to);
  // y[r * y_row + o] = x[row + r] . w[from + o] for r < rows, o < outs; with packed weights, `from` must
  // be the first output of a panel.
  void (*product)(const Weight& w, const LinearRows& x, int64_t row, int64_t rows, int64_t from, int64_t outs, float* y,
                  int64_t y_row);
  // y[o] += added[o].
  void (*add)(const float* added, int64_t n, float* y);
  // y[o] = gate(y[o]) * up[o]; without `up`, y[o] = gate(y[o]).
  void (*gate)(Gate gate, const float* up, int64_t n, float* y);
};

}  // namespace precast
