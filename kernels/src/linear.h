// What a linear call works on: weights in one of four formats, and rows of activations prepared for them.
#pragma once

#include <cstdint>
#include <cstring>

namespace precast {

// Packed weights keep kPanel outputs together, and kGroup inputs of an output share a scale.
constexpr int kPanel = 16;
constexpr int kGroup = 32;

enum class Format { kFloat32, kBfloat16, kInt8, kInt4 };

// One layer's weights. Float formats: values [outs, in]. Packed formats, P = outs / kPanel and I = in, both rounded
// up and filled with zeros: int8 values [P, I / 2, kPanel, 2]; int4 values [P, I / 8, kPanel, 4], of eight inputs
// the first four in the low halves of the bytes; scale and minimum [P, I / kGroup, kPanel] in half precision.
struct Weight {
  Format format;
  const void* values;
  const uint16_t* scale;
  const uint16_t* minimum;  // int4: added to scale times value
  int64_t outs;
};

// Activations as integers, each part null where no weight of the call needs it. For int8 weights: 16 bits and a scale
// a row. For int4 and few rows: those, and the high and low bytes of q. For int4 and many rows: bytes, with a scale a
// group, for which the products are half as many. `sums` are the sums of groups: of q, or of bytes times their scale.
struct QuantizedRows {
  int16_t* q;          // [rows, in_pad]
  int8_t *high, *low;  // [rows, in_pad]
  float* scale;        // [rows]
  int8_t* bytes;       // [rows, in_pad]
  float* group_scale;  // [rows, in_pad / kGroup]
  float* sums;         // [rows, in_pad / kGroup]
  int64_t in_pad;
};

struct LinearRows {
  const float* x;  // [rows, in], for float weights
  int64_t in;
  QuantizedRows quantized;  // for packed weights
};

// Up to as many rows are multiplied one by one with weights as they lie; more are worth unpacking for.
constexpr int64_t kFewRows = 4;

enum class Gate { kNone, kSilu, kGeluTanh };

// IEEE half precision to single. By integers where the half is subnormal: XLA's threads count subnormals as zero.
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
  // y = x / sqrt(mean(x^2) + eps) * weight, of n elements. Where there is a bias: that of x less its mean, plus bias.
  void (*normalize)(const float* x, const float* weight, const float* bias, float eps, int64_t n, float* y);
  // Fills row `row` of `to`, each part of it that is not null, from `in` floats.
  void (*quantize)(const float* x, int64_t in, int64_t row, const QuantizedRows& to);
  // y[r * y_row + o] = x[row + r] . w[from + o] for r < rows, o < outs; of packed weights `from` begins a panel.
  void (*product)(const Weight& w, const LinearRows& x, int64_t row, int64_t rows, int64_t from, int64_t outs,
                  float* y, int64_t y_row);
  // y[o] += added[o].
  void (*add)(const float* added, int64_t n, float* y);
  // y[o] = gate(y[o]) * up[o], or without `up` gate(y[o]).
  void (*gate)(Gate gate, const float* up, int64_t n, float* y);
};

}  // namespace precast
