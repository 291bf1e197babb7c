// The choice of the instruction set: the forced one or, by default, the widest that this CPU supports.
#include <atomic>
#include <cstring>

#include "ops.h"

namespace precast {
namespace {

bool Supported(const Ops& ops) {
#if defined(__x86_64__)
  if (std::strcmp(ops.name, "avx512") == 0)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  if (std::strcmp(ops.name, "avx2") == 0)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
  return std::strcmp(ops.name, "portable") == 0;
}

// Widest first.
const Ops* const* AllOps() {
  static const Ops* const all[] = {
#if defined(__x86_64__)
      &Avx512Ops(), &Avx2Ops(),
#endif
      &PortableOps(), nullptr};
  return all;
}

const Ops* Best() {
  const Ops* const* ops = AllOps();
  while (!Supported(**ops)) ++ops;
  return *ops;
}

std::atomic<const Ops*> forced{nullptr};

}  // namespace

const Ops& CurrentOps() {
  if (const Ops* ops = forced.load(std::memory_order_acquire)) return *ops;
  static const Ops* const best = Best();
  return *best;
}

const Ops* FindOps(const char* name) {
  for (const Ops* const* ops = AllOps(); *ops != nullptr; ++ops)
    if (std::strcmp((*ops)->name, name) == 0 && Supported(**ops)) return *ops;
  return nullptr;
}

void ForceOps(const Ops* ops) { forced.store(ops, std::memory_order_release); }

}  // namespace precast
