// The formats of mixed weights, which exporter/block_formats.py describes. Each panel of kPanel outputs is one record
// of bytes: coefficients, low bits of the codes, high bits.
#pragma once

#include <cstdint>

namespace precast {

// How a format stores the coefficients of its groups.
enum class Scales { kHalf, kHalfAndMinimum, kSuper, kSuperOf16, kSuperSigned, kExponent, kFloat };

// Groups of a super-group, which share half-precision factors, and 12-bit numbers that are packed together, or groups
// that share a float scale.
constexpr int64_t kSuper = 8, kPacked = 4;
// Matrices begin at multiples of this many bytes, and records have sizes that are multiples of it.
constexpr int64_t kBlockUnit = 64;

// The integers that 4-bit codes represent. If they are narrow, up to 16 in size, they are multiplied as small unsigned
// bytes, and 16-bit sums hold the products of a group with 8-bit activations. Otherwise, activations have 16 bits.
struct Codebook {
  static constexpr int kNarrow = 16;
  int8_t integers[16];
  bool is_narrow;
  int zero;          // the smallest integer, negated, if the integers are narrow; otherwise 0
  int8_t bytes[16];  // the integers plus `zero`
};

constexpr Codebook CodebookOf(const int8_t (&integers)[16]) {
  Codebook book = {};
  int least = integers[0], most = integers[0];
  for (int integer : integers) {
    least = integer < least ? integer : least;
    most = integer > most ? integer : most;
  }
  book.is_narrow = least >= -Codebook::kNarrow && most <= Codebook::kNarrow;
  book.zero = book.is_narrow ? -least : 0;
  for (int i = 0; i < 16; ++i) {
    book.integers[i] = integers[i];
    book.bytes[i] = static_cast<int8_t>(integers[i] + book.zero);
  }
  return book;
}

// The integers of iq4_nl and iq4_xs, and those of mxfp4: e2m1 numbers, doubled.
constexpr Codebook kNonLinear = CodebookOf({-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113});
constexpr Codebook kE2M1 = CodebookOf({0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12});

struct BlockFormat {
  int bits;
  Scales scales;
  int zero;                            // the code, or the byte of a codebook, that represents zero; 0 with minima
  const Codebook* codebook = nullptr;  // for 4 bits; null if codes represent themselves, minus `zero`

  // True if activations are quantised to 16 bits.
  constexpr bool IsWide() const {
    return (bits == 8 && !HasFloatCodes()) || (codebook != nullptr && !codebook->is_narrow);
  }
  // True if the codes are numbers in e4m3, which multiply floats.
  constexpr bool HasFloatCodes() const { return scales == Scales::kFloat; }
  constexpr bool HasMinima() const { return scales == Scales::kHalfAndMinimum || scales == Scales::kSuper; }
  // Sizes in bytes of the sections of a record with this many groups of 32 inputs and panels of 16 outputs.
  constexpr int64_t CoefficientBytes(int64_t groups) const {
    const int64_t supers = (groups + kSuper - 1) / kSuper;
    switch (scales) {
      case Scales::kHalf: return 32 * groups;
      case Scales::kHalfAndMinimum: return 64 * groups;
      case Scales::kSuper: return 64 * supers + 96 * ((groups + kPacked - 1) / kPacked);
      case Scales::kSuperOf16: return 32 * supers + 32 * groups;
      case Scales::kSuperSigned: return 128 * supers;
      case Scales::kExponent: return 16 * groups;
      case Scales::kFloat: return 64 * ((groups + kPacked - 1) / kPacked);
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
    {8, Scales::kHalf, 0},                                    // q8_0
    {4, Scales::kHalf, 8},                                    // q4_0
    {4, Scales::kHalfAndMinimum, 0},                          // q4_1
    {5, Scales::kHalf, 16},                                   // q5_0
    {5, Scales::kHalfAndMinimum, 0},                          // q5_1
    {4, Scales::kSuper, 0},                                   // q4_k
    {5, Scales::kSuper, 0},                                   // q5_k
    {6, Scales::kSuperOf16, 32},                              // q6_k
    {4, Scales::kHalf, kNonLinear.zero, &kNonLinear},         // iq4_nl
    {4, Scales::kSuperSigned, kNonLinear.zero, &kNonLinear},  // iq4_xs
    {4, Scales::kExponent, kE2M1.zero, &kE2M1},               // mxfp4
    {8, Scales::kFloat, 0},                                   // e4m3
};
constexpr int32_t kBlockCodes = sizeof kBlockFormats / sizeof kBlockFormats[0];

// The format with this code; null if the code is unknown.
constexpr const BlockFormat* BlockFormatOf(int32_t code) {
  return code >= 1 && code <= kBlockCodes ? &kBlockFormats[code - 1] : nullptr;
}

}  // namespace precast
