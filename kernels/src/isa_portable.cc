// Any CPU: vectors of four floats, which every compiler maps to the target's registers (SSE2, NEON, scalars).
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "ops.h"
#if defined(__aarch64__)
#include <arm_neon.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace precast {
#if defined(__SSE2__)
#define PRECAST_ISA 128
#else
#define PRECAST_ISA 0
#endif
namespace portable {
constexpr char kName[] = "portable";
constexpr int kWidth = 4;
constexpr int kQuantRows = 4;
#include "isa.inc"
}  // namespace portable

const Ops& PortableOps() { return portable::kOps; }
}  // namespace precast
