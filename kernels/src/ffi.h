// The handlers XLA calls. A change to a handler's arguments is a new name (…V2) and a new ABI version.
#pragma once

#include "xla/ffi/api/c_api.h"

namespace precast {
constexpr int kAbiVersion = 1;
}

extern "C" {
XLA_FFI_Error* PrecastMatmulV1(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* PrecastAttentionV1(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* PrecastReserveV1(XLA_FFI_CallFrame* call_frame);
}
