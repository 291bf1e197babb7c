// What the handlers share: error texts and the shapes in them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>

#include "xla/ffi/api/ffi.h"

namespace precast {

namespace ffi = xla::ffi;

inline ffi::Error Bad(const std::string& what) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, "precast: " + what);
}

inline std::string Shape(ffi::AnyBuffer::Dimensions dims) {
  std::string text = "[";
  for (size_t i = 0; i < dims.size(); ++i) text += (i ? ", " : "") + std::to_string(dims[i]);
  return text + "]";
}

}  // namespace precast
