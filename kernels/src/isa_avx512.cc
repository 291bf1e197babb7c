// AVX-512: thirty-two registers of sixteen floats.
#if defined(__x86_64__)
#include <immintrin.h>

#include "isa_target.h"

PRECAST_BEGIN_TARGET("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c")
namespace precast {
#define PRECAST_ISA 512
namespace avx512 {
constexpr char kName[] = "avx512";
constexpr int kWidth = 16;
constexpr int kQuantRows = 8;
#include "isa.inc"
}  // namespace avx512

const Ops& Avx512Ops() { return avx512::kOps; }
}  // namespace precast
PRECAST_END_TARGET
#endif
