// Stacks of equal arrays, one entry for each layer or expert.
#pragma once

#include <cstdint>

#include "linear.h"

namespace precast {

// A stack of arrays; `base` is null if the call has no such operand.
template <typename T>
struct Stack {
  const T* base = nullptr;
  int64_t stride = 0;  // elements from one entry to the next

  const T* At(int64_t i) const { return base == nullptr ? nullptr : base + i * stride; }
};

// A stack of weights in one format and of one size.
struct WeightStack {
  Format format = Format::kFloat32;
  int64_t outs = 0;
  Stack<char> values = {};  // strides in bytes
  Stack<uint16_t> scale = {}, minimum = {};

  Weight At(int64_t i) const {
    return {.format = format, .values = values.At(i), .scale = scale.At(i), .minimum = minimum.At(i), .outs = outs};
  }
};

}  // namespace precast
