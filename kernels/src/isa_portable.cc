// Any CPU: vectors of four, which every compiler maps to what the target has (SSE2, NEON, scalars).
#include <cmath>
#include <cstdint>
#include <memory>
#include <utility>

#include "ops.h"

namespace precast {
#define PRECAST_ISA 0
namespace portable {
constexpr int kWidth = 4;
constexpr int kQuantRows = 4;
#include "simd.inc"
#include "int8.inc"
#include "quantized.inc"
#include "cache.inc"
#include "panels.inc"
#include "matmul.inc"
#include "linear.inc"
#include "attention.inc"
#include "argmax.inc"
}  // namespace portable

const Ops& PortableOps() {
  static constexpr Ops ops = {"portable", portable::kLinearOps, portable::StoreRows, portable::Attention,
                              portable::MergeSpans, portable::Argmax};
  return ops;
}
}  // namespace precast
