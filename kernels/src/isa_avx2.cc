// AVX2 and FMA: sixteen registers of eight floats.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <memory>
#include <utility>

#include "ops.h"

// Only what follows is compiled for AVX2: code from the headers above stays fit for any CPU.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

namespace precast {
#define PRECAST_ISA 256
namespace avx2 {
constexpr int kWidth = 8;
constexpr int kQuantRows = 6;
#include "simd.inc"
#include "int8.inc"
#include "quantized.inc"
#include "cache.inc"
#include "panels.inc"
#include "matmul.inc"
#include "linear.inc"
#include "attention.inc"
#include "argmax.inc"
}  // namespace avx2

const Ops& Avx2Ops() {
  static constexpr Ops ops = {"avx2", avx2::kLinearOps, avx2::StoreRows, avx2::Attention,
                              avx2::MergeSpans, avx2::Argmax};
  return ops;
}
}  // namespace precast

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
