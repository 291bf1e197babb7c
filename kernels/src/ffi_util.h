// What the handlers share: error texts and the shapes in them.
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

// A handler whose exceptions, of memory above all, become errors: XLA knows none, and would end the process.
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

}  // namespace precast
