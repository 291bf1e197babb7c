// Any CPU: vectors of four, which every compiler maps to what the target has (SSE2, NEON, scalars).
#include <cmath>
#include <cstdint>

#include "ops.h"

namespace precast {
namespace portable {
constexpr int kWidth = 4;
constexpr int kRows = 4;
constexpr int kColumns = 3;
#include "simd.inc"
#include "matmul.inc"
#include "attention.inc"
}  // namespace portable

const Ops& PortableOps() {
  static constexpr Ops ops = {"portable", portable::Matmul, portable::Attention};
  return ops;
}
}  // namespace precast
