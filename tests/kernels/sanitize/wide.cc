// The source of the AVX-512 kernels compiled for any CPU: the compiler emulates the registers, the arithmetic is the
// same.
#include <cmath>
#include <cstdint>
#include <memory>
#include <utility>

#include "ops.h"

namespace precast {
#define PRECAST_ISA 0
namespace wide {
constexpr char kName[] = "wide";
constexpr int kWidth = 16;
constexpr int kQuantRows = 6;
#include "isa.inc"
}  // namespace wide

const Ops& WideOps() { return wide::kOps; }
}  // namespace precast
