// AVX-512: thirty-two registers of sixteen floats.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <memory>
#include <utility>

#include "ops.h"

// Only what follows is compiled for AVX-512: code from the headers above stays fit for any CPU.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c")
#endif

namespace precast {
#define PRECAST_ISA 512
namespace avx512 {
constexpr int kWidth = 16;
constexpr int kQuantRows = 8;
#include "simd.inc"
#include "int8.inc"
#include "quantized.inc"
#include "cache.inc"
#include "panels.inc"
#include "matmul.inc"
#include "linear.inc"
#include "attention.inc"
#include "argmax.inc"
}  // namespace avx512

const Ops& Avx512Ops() {
  static constexpr Ops ops = {"avx512", avx512::kLinearOps, avx512::StoreRows, avx512::Attention,
                              avx512::MergeSpans, avx512::Argmax};
  return ops;
}
}  // namespace precast

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
