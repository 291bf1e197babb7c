// The handlers that XLA calls. A handler whose arguments change needs a new name (…V2). Removing a handler requires a
// new ABI version, because artifacts of the current version may call it.
#pragma once

#include "xla/ffi/api/c_api.h"

namespace precast {
constexpr int kAbiVersion = 3;
}

extern "C" {
XLA_FFI_Error* PrecastArgmaxV1(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* PrecastArgmaxV2(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* PrecastEmbedV1(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* PrecastLinearV1(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* PrecastLayersV2(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* PrecastAttentionV2(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* PrecastReserveV1(XLA_FFI_CallFrame* call_frame);
}
