// precast.reserve: reserves memory for an empty cache.
#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <cstdint>

#include "ffi.h"
#include "ffi_util.h"

namespace precast {
namespace {

constexpr size_t kHugePage = 2 << 20;

// Keep a large array in small pages. A huge page is larger than all positions of one slot and head, so it would also
// take memory for idle slots and empty positions.
void UseSmallPages([[maybe_unused]] void* array, [[maybe_unused]] size_t bytes) {
#ifdef __linux__
  if (bytes < kHugePage) return;
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE)), start = reinterpret_cast<uintptr_t>(array);
  const uintptr_t first = (start + page - 1) / page * page, last = (start + bytes) / page * page;
  // An operating system without huge pages refuses the advice; nothing is lost.
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_NOHUGEPAGE);
#endif
}

// XLA has allocated the results; the operating system maps their pages at the first write.
ffi::Error ReserveHandler(ffi::RemainingRets results) {
  for (size_t i = 0; i < results.size(); ++i)
    if (auto array = results.get<ffi::AnyBuffer>(i); array.has_value())
      UseSmallPages((*array)->untyped_data(), (*array)->size_bytes());
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(PrecastReserveV1, ReserveHandler, ffi::Ffi::Bind().RemainingRets());

}  // namespace precast
