// AVX2 and FMA: sixteen registers of eight floats.
#if defined(__x86_64__)
#include <cmath>
#include <cstdint>

#include "ops.h"

// Only what follows is compiled for AVX2: code from the headers above stays fit for any CPU.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

namespace precast {
namespace avx2 {
constexpr int kWidth = 8;
constexpr int kRows = 4;
constexpr int kColumns = 3;
#include "simd.inc"
#include "matmul.inc"
#include "attention.inc"
}  // namespace avx2

const Ops& Avx2Ops() {
  static constexpr Ops ops = {"avx2", avx2::Matmul, avx2::Attention};
  return ops;
}
}  // namespace precast

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
