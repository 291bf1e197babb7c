// precast.reserve: reserves memory for an empty cache.
#include "ffi.h"
#include "ffi_util.h"

namespace precast {
namespace {

// XLA has allocated the results; the operating system maps their pages at the first write.
ffi::Error ReserveHandler(ffi::RemainingRets) { return ffi::Error::Success(); }

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(PrecastReserveV1, ReserveHandler, ffi::Ffi::Bind().RemainingRets());

}  // namespace precast
