// The source of the AVX-512 kernels, compiled for any CPU: its registers are emulated, its arithmetic is the same.
#include <cmath>
#include <cstdint>
#include <memory>
#include <utility>

#include "ops.h"

namespace precast {
#define PRECAST_ISA 0
namespace wide {
constexpr int kWidth = 16;
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
}  // namespace wide

const Ops& WideOps() {
  static constexpr Ops ops = {"wide", wide::kLinearOps, wide::StoreRows, wide::Attention, wide::MergeSpans,
                              wide::Argmax};
  return ops;
}
}  // namespace precast
