// AVX2 and FMA: sixteen registers of eight floats.
#if defined(__x86_64__)
#include <immintrin.h>

#include "isa_target.h"

PRECAST_BEGIN_TARGET("avx2,fma,f16c")
namespace precast {
#define PRECAST_ISA 256
namespace avx2 {
constexpr char kName[] = "avx2";
constexpr int kWidth = 8;
constexpr int kQuantRows = 6;
#include "isa.inc"
}  // namespace avx2

const Ops& Avx2Ops() { return avx2::kOps; }
}  // namespace precast
PRECAST_END_TARGET
#endif
