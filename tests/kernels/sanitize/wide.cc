// The source of the AVX-512 kernels, compiled for any CPU: its registers are emulated, its arithmetic is the same.
#include <cmath>
#include <cstdint>

#include "ops.h"

namespace precast {
namespace wide {
constexpr int kWidth = 16;
constexpr int kRows = 6;
constexpr int kColumns = 4;
#include "simd.inc"
#include "matmul.inc"
#include "attention.inc"
}  // namespace wide

const Ops& WideOps() {
  static constexpr Ops ops = {"wide", wide::Matmul, wide::Attention};
  return ops;
}
}  // namespace precast
