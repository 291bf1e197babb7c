// Stacks of arrays of one size, with an entry for each layer or expert.
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

// A stack of weights of one size, all in the same format or mixed.
struct WeightStack {
  Format format = Format::kFloat32;
  int64_t outs = 0;
  Stack<char> values = {};  // strides in bytes
  Stack<uint16_t> scale = {}, minimum = {};
  // For mixed weights, two numbers for each entry: the code of its block format, and its first unit. Both are already
  // checked. `values` then has a stride of one unit.
  Stack<int32_t> table = {};

  Weight At(int64_t i) const {
    if (const int32_t* entry = table.At(i); entry != nullptr)
      return {.format = format, .blocks = BlockFormatOf(entry[0]), .values = values.At(entry[1]), .outs = outs};
    return {.format = format, .values = values.At(i), .scale = scale.At(i), .minimum = minimum.At(i), .outs = outs};
  }
};

}  // namespace precast
