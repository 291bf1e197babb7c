// The formats of mixed weights, which exporter/block_formats.py describes. Each panel of kPanel outputs is one record
// of bytes: coefficients, low bits of the codes, high bits.
#pragma once

#include <cstdint>

namespace precast {

// How a format stores the coefficients of its groups.
enum class Scales { kHalf, kHalfAndMinimum, kSuper, kSuperOf16 };

// Groups that share half-precision coefficients, and groups whose 6-bit codes are packed together.
constexpr int64_t kSuper = 8, kPacked = 4;
// Matrices begin at multiples of this many bytes, and records have sizes that are multiples of it.
constexpr int64_t kBlockUnit = 64;

struct BlockFormat {
  int bits;
  Scales scales;
  int zero;  // the code that represents zero; 0 with minima

  // Sizes in bytes of the sections of a record with this many groups of 32 inputs and panels of 16 outputs.
  constexpr int64_t CoefficientBytes(int64_t groups) const {
    const int64_t supers = (groups + kSuper - 1) / kSuper;
    switch (scales) {
      case Scales::kHalf: return 32 * groups;
      case Scales::kHalfAndMinimum: return 64 * groups;
      case Scales::kSuper: return 64 * supers + 96 * ((groups + kPacked - 1) / kPacked);
      case Scales::kSuperOf16: return 32 * supers + 32 * groups;
    }
    return 0;
  }
  constexpr int64_t LowBytes(int64_t groups) const { return (bits == 8 ? 512 : 256) * groups; }
  constexpr int64_t HighBytes(int64_t groups) const { return bits == 8 ? 0 : 64 * (bits - 4) * groups; }
  constexpr int64_t RecordBytes(int64_t groups) const {
    const int64_t bytes = CoefficientBytes(groups) + LowBytes(groups) + HighBytes(groups);
    return (bytes + kBlockUnit - 1) / kBlockUnit * kBlockUnit;
  }
};

// The formats in the order of their codes, which begin at 1.
constexpr BlockFormat kBlockFormats[] = {
    {8, Scales::kHalf, 0},            // q8_0
    {4, Scales::kHalf, 8},            // q4_0
    {4, Scales::kHalfAndMinimum, 0},  // q4_1
    {5, Scales::kHalf, 16},           // q5_0
    {5, Scales::kHalfAndMinimum, 0},  // q5_1
    {4, Scales::kSuper, 0},           // q4_k
    {5, Scales::kSuper, 0},           // q5_k
    {6, Scales::kSuperOf16, 32},      // q6_k
};
constexpr int32_t kBlockCodes = sizeof kBlockFormats / sizeof kBlockFormats[0];

// The format with this code; null if the code is unknown.
constexpr const BlockFormat* BlockFormatOf(int32_t code) {
  return code >= 1 && code <= kBlockCodes ? &kBlockFormats[code - 1] : nullptr;
}

}  // namespace precast
