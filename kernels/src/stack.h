// Stacks of one kind of operand, of which a call takes one after another.
#pragma once

#include <cstdint>

#include "linear.h"

namespace precast {

// Entry i of a stack of `count`, from where the first and the last lie.
template <typename T>
const T* Between(const T* first, const T* last, int64_t i, int64_t count) {
  if (first == nullptr || count == 1) return first;
  const auto begin = reinterpret_cast<intptr_t>(first), end = reinterpret_cast<intptr_t>(last);
  return reinterpret_cast<const T*>(begin + (end - begin) / (count - 1) * i);
}

inline Weight Between(const Weight& first, const Weight& last, int64_t i, int64_t count) {
  Weight w = first;
  w.values = Between(static_cast<const char*>(first.values), static_cast<const char*>(last.values), i, count);
  w.scale = Between(first.scale, last.scale, i, count);
  w.minimum = Between(first.minimum, last.minimum, i, count);
  return w;
}

}  // namespace precast
