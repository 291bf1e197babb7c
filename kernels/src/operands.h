// The operands of a call, read in order and checked one by one.
#pragma once

#include <initializer_list>
#include <optional>
#include <string>

#include "ffi_util.h"
#include "linear_call.h"
#include "stack.h"

namespace precast {

// The operands of a call, read in order. Keeps the first error.
class Operands {
 public:
  Operands(const char* call, const ffi::RemainingArgs& args) : call_(call), args_(args) {}

  bool AtEnd() const { return place_ == args_.size(); }
  const ffi::Error& error() const { return error_; }

  std::optional<ffi::AnyBuffer> Next(const char* name) {
    const std::optional<ffi::AnyBuffer> buffer = Peek();
    if (buffer.has_value())
      ++place_;
    else
      Fail(std::string("operand ") + name + " is missing");
    return buffer;
  }

  std::optional<ffi::AnyBuffer> Peek() const {
    if (AtEnd()) return std::nullopt;
    auto buffer = args_.get<ffi::AnyBuffer>(place_);
    if (!buffer.has_value()) return std::nullopt;
    return *buffer;
  }

  // The next operand, of this type and shape.
  template <typename T>
  const T* Take(const char* name, ffi::DataType type, std::initializer_list<int64_t> shape) {
    const std::optional<ffi::AnyBuffer> buffer = Next(name);
    if (!buffer.has_value() || !Check(name, *buffer, type, shape, 0)) return nullptr;
    return reinterpret_cast<const T*>(buffer->untyped_data());
  }

  // The next operand: a stack of arrays of this type and shape that has an entry `last`.
  template <typename T>
  Stack<T> TakeStack(const char* name, int64_t last, ffi::DataType type, std::initializer_list<int64_t> shape) {
    const std::optional<ffi::AnyBuffer> buffer = Next(name);
    if (!buffer.has_value() || !Check(name, *buffer, type, shape, 1)) return {};
    if (last < 0 || last >= buffer->dimensions()[0]) {
      Fail(std::string(name) + " " + Shape(buffer->dimensions()) + ": no entry " + std::to_string(last));
      return {};
    }
    Stack<T> stack = {.base = reinterpret_cast<const T*>(buffer->untyped_data()), .stride = 1};
    for (int64_t n : shape) stack.stride *= n;
    return stack;
  }

  void Fail(const std::string& what) {
    if (error_.success()) error_ = Bad(std::string(call_) + ": " + what);
  }

 private:
  // Return true if the buffer has this type, and this shape after `stacked` axes of any size.
  bool Check(const char* name, const ffi::AnyBuffer& buffer, ffi::DataType type, std::initializer_list<int64_t> shape,
             size_t stacked) {
    const auto dims = buffer.dimensions();
    if (buffer.element_type() == type && dims.size() == shape.size() + stacked &&
        std::equal(shape.begin(), shape.end(), dims.begin() + stacked))
      return true;
    std::string expected = stacked == 0 ? "[" : "[L";
    for (size_t i = 0; i < shape.size(); ++i)
      expected += (i + stacked > 0 ? ", " : "") + std::to_string(shape.begin()[i]);
    Fail(std::string(name) + ": expected " + TypeName(type) + " " + expected + "], found " +
         TypeName(buffer.element_type()) + " " + Shape(dims));
    return false;
  }

  const char* call_;
  const ffi::RemainingArgs& args_;
  size_t place_ = 0;
  ffi::Error error_ = ffi::Error::Success();
};

inline std::optional<Format> FormatOf(ffi::DataType type) {
  switch (type) {
    case ffi::F32: return Format::kFloat32;
    case ffi::BF16: return Format::kBfloat16;
    case ffi::S8: return Format::kInt8;
    case ffi::U8: return Format::kInt4;
    default: return std::nullopt;
  }
}

template <typename T>
Stack<char> Bytes(const Stack<T>& stack) {
  return {.base = reinterpret_cast<const char*>(stack.base), .stride = stack.stride * int64_t{sizeof(T)}};
}

// The next stack of mixed weights: units of bytes, then a table with an entry `last`.
inline WeightStack TakeMixed(Operands& operands, int64_t last, int64_t outs, int64_t in) {
  WeightStack w = {.format = Format::kBlocks, .outs = outs};
  const int64_t units = operands.Peek()->dimensions()[0];
  w.values = Bytes(operands.TakeStack<uint8_t>("mixed weights", units - 1, ffi::U8, {kBlockUnit}));
  w.table = operands.TakeStack<int32_t>("table of mixed weights", last, ffi::S32, {2});
  if (operands.error().failure()) return w;
  // The sizes may be any numbers of a hostile program. A panel, and a group of inputs, take at least a unit each.
  if (outs < 1 || in < 1 || outs / kPanel > units || in / kGroup > units) {
    operands.Fail("mixed weights: " + std::to_string(units) + " units cannot hold " + std::to_string(outs) +
                  " outputs of " + std::to_string(in) + " inputs");
    return w;
  }
  const int64_t panels = RoundUp(outs, kPanel) / kPanel, groups = RoundUp(in, kGroup) / kGroup;
  for (int64_t i = 0; i <= last; ++i) {
    const int32_t code = w.table.At(i)[0], unit = w.table.At(i)[1];
    const BlockFormat* format = BlockFormatOf(code);
    if (format == nullptr)
      operands.Fail("table of mixed weights: entry " + std::to_string(i) + " has the unknown format " +
                    std::to_string(code) + "; update precast");
    else if (unit < 0 || unit > units || panels > (units - unit) / (format->RecordBytes(groups) / kBlockUnit))
      operands.Fail("table of mixed weights: entry " + std::to_string(i) + " at unit " + std::to_string(unit) +
                    " ends beyond the " + std::to_string(units) + " units");
  }
  return w;
}

// The next stack of weights, which has an entry `last`; takes as many operands as the format has.
inline WeightStack TakeWeights(Operands& operands, int64_t last, int64_t outs, int64_t in) {
  if (const auto mixed = operands.Peek();
      mixed.has_value() && mixed->element_type() == ffi::U8 && mixed->dimensions().size() == 2)
    return TakeMixed(operands, last, outs, in);
  const std::optional<ffi::AnyBuffer> next = operands.Peek();
  const std::optional<Format> format = next.has_value() ? FormatOf(next->element_type()) : std::nullopt;
  WeightStack w = {.format = format.value_or(Format::kFloat32), .outs = outs};
  if (!format.has_value()) {
    operands.Fail(next.has_value()
                      ? "weights: expected float32, bfloat16, int8 or uint8, found " + TypeName(next->element_type())
                      : "operand weights is missing");
    return w;
  }
  const int64_t panels = RoundUp(outs, kPanel) / kPanel, pad = RoundUp(in, kGroup), groups = pad / kGroup;
  switch (*format) {
    case Format::kBlocks: break;  // no type stands for it
    case Format::kFloat32: w.values = Bytes(operands.TakeStack<float>("weights", last, ffi::F32, {outs, in})); break;
    case Format::kBfloat16:
      w.values = Bytes(operands.TakeStack<uint16_t>("weights", last, ffi::BF16, {outs, in}));
      break;
    case Format::kInt8:
      w.values = Bytes(operands.TakeStack<int8_t>("int8 weights", last, ffi::S8, {panels, pad / 2, kPanel, 2}));
      w.scale = operands.TakeStack<uint16_t>("scale", last, ffi::F16, {panels, groups, kPanel});
      break;
    case Format::kInt4:
      w.values = Bytes(operands.TakeStack<uint8_t>("int4 weights", last, ffi::U8, {panels, pad / 8, kPanel, 4}));
      w.scale = operands.TakeStack<uint16_t>("scale", last, ffi::F16, {panels, groups, kPanel});
      // No weight begins with a float16 array, so this operand tells whether the weights have minima.
      if (const auto minimum = operands.Peek(); minimum.has_value() && minimum->element_type() == ffi::F16)
        w.minimum = operands.TakeStack<uint16_t>("minimum", last, ffi::F16, {panels, groups, kPanel});
      break;
  }
  return w;
}

}  // namespace precast
