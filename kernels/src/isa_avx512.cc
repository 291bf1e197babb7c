// AVX-512: thirty-two registers of sixteen floats.
#if defined(__x86_64__)
#include <cmath>
#include <cstdint>

#include "ops.h"

// Only what follows is compiled for AVX-512: code from the headers above stays fit for any CPU.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")
#endif

namespace precast {
namespace avx512 {
constexpr int kWidth = 16;
constexpr int kRows = 6;
constexpr int kColumns = 4;
#include "simd.inc"
#include "matmul.inc"
#include "attention.inc"
}  // namespace avx512

const Ops& Avx512Ops() {
  static constexpr Ops ops = {"avx512", avx512::Matmul, avx512::Attention};
  return ops;
}
}  // namespace precast

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
