// Reads the operands of a call one after the other, checking each.
#pragma once

#include <initializer_list>
#include <optional>
#include <string>

#include "ffi_util.h"
#include "linear_call.h"

namespace precast {

// Operands that follow one another; remembers the first that is not as it must be.
class Operands {
 public:
  Operands(const char* call, const ffi::RemainingArgs& args) : call_(call), args_(args) {}

  size_t place() const { return place_; }
  void Seek(size_t place) { place_ = place; }
  bool AtEnd() const { return place_ == args_.size(); }
  const ffi::Error& error() const { return error_; }

  std::optional<ffi::AnyBuffer> Next(const char* what) {
    const std::optional<ffi::AnyBuffer> buffer = Peek();
    if (buffer.has_value()) ++place_;
    else Fail(std::string("operand ") + what + " is missing");
    return buffer;
  }

  std::optional<ffi::AnyBuffer> Peek() const {
    if (AtEnd()) return std::nullopt;
    auto buffer = args_.get<ffi::AnyBuffer>(place_);
    if (!buffer.has_value()) return std::nullopt;
    return *buffer;
  }

  // The next operand, of this type and these axes.
  template <typename T>
  const T* Take(const char* what, ffi::DataType type, std::initializer_list<int64_t> axes) {
    const std::optional<ffi::AnyBuffer> buffer = Next(what);
    if (!buffer.has_value() || !Check(what, *buffer, type, axes, 0)) return nullptr;
    return reinterpret_cast<const T*>(buffer->untyped_data());
  }

  // One layer of the next operand, a stack of this type with these axes behind the layers'.
  template <typename T>
  const T* TakeLayer(const char* what, int64_t layer, ffi::DataType type, std::initializer_list<int64_t> axes) {
    const std::optional<ffi::AnyBuffer> buffer = Next(what);
    if (!buffer.has_value() || !Check(what, *buffer, type, axes, 1)) return nullptr;
    if (layer < 0 || layer >= buffer->dimensions()[0]) {
      Fail("layer " + std::to_string(layer) + " of " + what + " " + Shape(buffer->dimensions()));
      return nullptr;
    }
    int64_t size = 1;
    for (int64_t n : axes) size *= n;
    return reinterpret_cast<const T*>(buffer->untyped_data()) + layer * size;
  }

  void Fail(const std::string& what) {
    if (error_.success()) error_ = Bad(std::string(call_) + ": " + what);
  }

 private:
  bool Check(const char* what, const ffi::AnyBuffer& buffer, ffi::DataType type, std::initializer_list<int64_t> axes,
             size_t before) {
    const auto dims = buffer.dimensions();
    if (buffer.element_type() == type && dims.size() == axes.size() + before &&
        std::equal(axes.begin(), axes.end(), dims.begin() + before))
      return true;
    Fail(std::string(what) + " of shape " + Shape(dims) + " or of its type does not fit the call");
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

// One layer of the next weights, of as many operands as their format has.
inline Weight TakeWeight(Operands& operands, int64_t layer, int64_t outs, int64_t in) {
  const std::optional<ffi::AnyBuffer> values = operands.Peek();
  const std::optional<Format> format = values.has_value() ? FormatOf(values->element_type()) : std::nullopt;
  Weight w = {format.value_or(Format::kFloat32), nullptr, nullptr, nullptr, outs};
  if (!format.has_value()) {
    operands.Fail("weights of a type that is not known, or too few operands");
    return w;
  }
  const int64_t panels = RoundUp(outs, kPanel) / kPanel, pad = RoundUp(in, kGroup), groups = pad / kGroup;
  switch (*format) {
    case Format::kFloat32: w.values = operands.TakeLayer<float>("weights", layer, ffi::F32, {outs, in}); break;
    case Format::kBfloat16: w.values = operands.TakeLayer<uint16_t>("weights", layer, ffi::BF16, {outs, in}); break;
    case Format::kInt8:
      w.values = operands.TakeLayer<int8_t>("int8 weights", layer, ffi::S8, {panels, pad / 2, kPanel, 2});
      w.scale = operands.TakeLayer<uint16_t>("scale", layer, ffi::F16, {panels, groups, kPanel});
      break;
    case Format::kInt4:
      w.values = operands.TakeLayer<uint8_t>("int4 weights", layer, ffi::U8, {panels, pad / 8, kPanel, 4});
      w.scale = operands.TakeLayer<uint16_t>("scale", layer, ffi::F16, {panels, groups, kPanel});
      w.minimum = operands.TakeLayer<uint16_t>("minimum", layer, ffi::F16, {panels, groups, kPanel});
      break;
  }
  return w;
}

}  // namespace precast
