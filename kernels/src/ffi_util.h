// Errors of the handlers, and the names and shapes in their texts.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>
#include <new>
#include <optional>
#include <string>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace precast {

namespace ffi = xla::ffi;

inline ffi::Error Bad(const std::string& what) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, "precast: " + what);
}

// Turn a handler's exceptions, such as std::bad_alloc, into errors, because an exception that reaches XLA ends the
// process.
template <auto kHandler>
struct Guard;
template <typename... Args, ffi::Error (*kHandler)(Args...)>
struct Guard<kHandler> {
  static ffi::Error Call(Args... args) {
    try {
      return kHandler(std::move(args)...);
    } catch (const std::bad_alloc&) {
      return ffi::Error(ffi::ErrorCode::kResourceExhausted, "precast: out of memory");
    } catch (const std::exception& error) {
      return ffi::Error(ffi::ErrorCode::kInternal, std::string("precast: ") + error.what());
    }
  }
};

inline std::string Shape(ffi::AnyBuffer::Dimensions dims) {
  std::string text = "[";
  for (size_t i = 0; i < dims.size(); ++i) text += (i ? ", " : "") + std::to_string(dims[i]);
  return text + "]";
}

// NumPy's name for a type.
inline std::string TypeName(ffi::DataType type) {
  switch (type) {
    case ffi::F64: return "float64";
    case ffi::F32: return "float32";
    case ffi::F16: return "float16";
    case ffi::BF16: return "bfloat16";
    case ffi::S64: return "int64";
    case ffi::S32: return "int32";
    case ffi::S16: return "int16";
    case ffi::S8: return "int8";
    case ffi::U32: return "uint32";
    case ffi::U16: return "uint16";
    case ffi::U8: return "uint8";
    case ffi::PRED: return "bool";
    default: return "another type";
  }
}

}  // namespace precast
