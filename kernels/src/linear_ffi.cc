// precast.linear: y = norm(x) W^T + b, with a residual added or a gate applied. precast.embed: looks up rows of weights
// in the same formats.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <string_view>

#include "ffi.h"
#include "operands.h"

namespace precast {
namespace {

// Rows that one task looks up.
constexpr int64_t kEmbedRows = 8;

std::optional<Gate> GateOf(std::string_view name) {
  if (name.empty()) return Gate::kNone;
  if (name == "silu") return Gate::kSilu;
  if (name == "gelu_tanh") return Gate::kGeluTanh;
  return std::nullopt;
}

using Scalar = ffi::BufferR0<ffi::S32>;

ffi::Error LinearHandler(ffi::ThreadPool pool, ffi::BufferR2<ffi::F32> x, Scalar layer_buffer, Scalar true_rows,
                         ffi::RemainingArgs rest, ffi::RemainingRets results, bool norm, float eps, bool residual,
                         bool bias, std::string_view gate) {
  const int64_t all = x.dimensions()[0], in = x.dimensions()[1];
  const int64_t used = true_rows.typed_data()[0], layer = layer_buffer.typed_data()[0];
  const std::optional<Gate> known = GateOf(gate);
  if (!known.has_value())
    return Bad("linear: expected gate '', 'silu' or 'gelu_tanh', found '" + std::string(gate) + "'");
  if (used < 0 || used > all)
    return Bad("linear: expected 0 to " + std::to_string(all) + " true rows, found " + std::to_string(used));
  if (results.size() == 0 || (results.size() > 1 && (residual || *known != Gate::kNone)))
    return Bad("linear: expected one result, or several without residual and gate, found " +
               std::to_string(results.size()));
  LinearCall c = {.rows = used, .in = in, .x = x.typed_data(), .eps = eps, .gate = *known};
  std::vector<int64_t> outs;
  for (size_t i = 0; i < results.size(); ++i) {
    auto y = results.get<ffi::AnyBuffer>(i);
    if (!y.has_value() || (*y)->element_type() != ffi::F32 || (*y)->dimensions().size() != 2 ||
        (*y)->dimensions()[0] != all)
      return Bad("linear: expected float32 results with as many rows as x " + Shape(x.dimensions()));
    outs.push_back((*y)->dimensions()[1]);
    c.parts.push_back({.weight = {}, .y = reinterpret_cast<float*>((*y)->untyped_data())});
  }
  Operands operands("linear", rest);
  if (norm) c.norm = operands.TakeStack<float>("norm", layer, ffi::F32, {in}).At(layer);
  if (residual) c.residual = operands.Take<float>("residual", ffi::F32, {all, outs[0]});
  for (size_t i = 0; i < c.parts.size(); ++i) {
    const int64_t n = outs[std::min(i, outs.size() - 1)];
    c.parts[i].weight = TakeWeights(operands, layer, n, in).At(layer);
    if (bias) c.parts[i].bias = operands.TakeStack<float>("bias", layer, ffi::F32, {n}).At(layer);
    // The product of a second weight multiplies the gated product of the first.
    if (i == 0 && c.gate != Gate::kNone && !operands.AtEnd()) c.parts.push_back({.weight = {}});
  }
  if (!operands.AtEnd()) operands.Fail("more operands than weights, biases, norm and residual take");
  if (operands.error().failure()) return operands.error();
  Team team(pool);
  Arena arena;
  // Results of padding are not written: filling the logits of idle slots would take as long as comparing them.
  RunLinear(team, arena, c);
  return ffi::Error::Success();
}

// Element (o, k) of a block format with `in` inputs.
float BlockElement(const Weight& w, int64_t o, int64_t k, int64_t in) {
  const BlockFormat& f = *w.blocks;
  const int64_t groups = RoundUp(in, kGroup) / kGroup, g = k / kGroup, i = k % kGroup, lane = o % kPanel;
  const char* record = static_cast<const char*>(w.values) + o / kPanel * f.RecordBytes(groups);
  const auto* low = reinterpret_cast<const uint8_t*>(record + f.CoefficientBytes(groups));
  const auto word = [&](int64_t place) {
    uint16_t bits;
    std::memcpy(&bits, record + 2 * place, sizeof bits);
    return bits;
  };
  const auto half = [&](int64_t row) { return HalfToFloat(word(row * kPanel + lane)); };
  // The 12-bit number i of those that begin at row `first` of 16 words.
  const auto twelve = [&](int64_t first, int64_t i) -> int {
    const auto packed = [&](int64_t j) { return word((first + i / kPacked * 3 + j) * kPanel + lane); };
    return i % kPacked < 3 ? packed(i % kPacked) & 0xfff
                           : packed(0) >> 12 | packed(1) >> 12 << 4 | packed(2) >> 12 << 8;
  };
  const int64_t supers = (groups + kSuper - 1) / kSuper;
  if (f.HasFloatCodes()) {
    float scale;
    std::memcpy(&scale, record + 4 * (g / kPacked * kPanel + lane), sizeof scale);
    return HalfToFloat(HalfOfE4M3(low[k * kPanel + lane])) * kE4M3Unit * scale;
  }
  int code;
  if (f.bits == 8) {
    code = reinterpret_cast<const int8_t*>(low)[(k / 2 * kPanel + lane) * 2 + k % 2];
  } else {
    const uint8_t byte = low[(k / 8 * kPanel + lane) * 4 + k % 4];
    const uint8_t* high = low + f.LowBytes(groups);
    const int64_t width = f.bits - 4, quad = i / 4 * width;  // offset of the quad's high bits, in bits
    code = k % 8 < 4 ? byte & 15 : byte >> 4;
    if (width > 0)
      code |= (high[((g * width + quad / 8) * kPanel + lane) * 4 + k % 4] >> quad % 8 & ((1 << width) - 1)) << 4;
  }
  const auto value = static_cast<float>(f.codebook == nullptr ? code - f.zero : f.codebook->integers[code]);
  switch (f.scales) {
    case Scales::kHalf: return half(g) * value;
    case Scales::kHalfAndMinimum: return half(2 * g) * value + half(2 * g + 1);
    case Scales::kSuper: {
      const int both = twelve(2 * supers, g);
      return half(g / kSuper * 2) * static_cast<float>(both & 63) * value -
             half(g / kSuper * 2 + 1) * static_cast<float>(both >> 6);
    }
    case Scales::kSuperOf16: {
      const auto* scales = reinterpret_cast<const int8_t*>(record + supers * kPanel * 2);
      return half(g / kSuper) * static_cast<float>(scales[k / 16 * kPanel + lane]) * value;
    }
    case Scales::kSuperSigned: {
      const int six = twelve(supers, g / 2) >> (g % 2 * 6) & 63;
      return half(g / kSuper) * static_cast<float>((six ^ 32) - 32) * value;
    }
    case Scales::kFloat: break;
    case Scales::kExponent: return std::ldexp(value, static_cast<uint8_t>(record[g * kPanel + lane]) - 128);
  }
  return 0.0f;
}

// Element (o, k) of weights with `in` inputs.
float Element(const Weight& w, int64_t o, int64_t k, int64_t in) {
  const int64_t pad = RoundUp(in, kGroup), panel = o / kPanel, lane = o % kPanel;
  const auto half = [&](const uint16_t* halves) {
    return HalfToFloat(halves[(panel * (pad / kGroup) + k / kGroup) * kPanel + lane]);
  };
  switch (w.format) {
    case Format::kBlocks: return BlockElement(w, o, k, in);
    case Format::kFloat32: return static_cast<const float*>(w.values)[o * in + k];
    case Format::kBfloat16: {
      const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(w.values)[o * in + k]) << 16;
      float value;
      std::memcpy(&value, &bits, sizeof value);
      return value;
    }
    case Format::kInt8: {
      const auto* values = static_cast<const int8_t*>(w.values);
      return half(w.scale) * values[((panel * (pad / 2) + k / 2) * kPanel + lane) * 2 + k % 2];
    }
    case Format::kInt4: {
      const auto* values = static_cast<const uint8_t*>(w.values);
      const uint8_t byte = values[((panel * (pad / 8) + k / 8) * kPanel + lane) * 4 + k % 4];
      const float scale = half(w.scale), minimum = w.minimum == nullptr ? -8.0f * scale : half(w.minimum);
      return scale * (k % 8 < 4 ? byte & 15 : byte >> 4) + minimum;
    }
  }
  return 0.0f;
}

ffi::Error EmbedHandler(ffi::ThreadPool pool, ffi::BufferR1<ffi::S32> tokens, ffi::RemainingArgs rest,
                        ffi::ResultBufferR2<ffi::F32> result, int64_t vocab) {
  const int64_t rows = tokens.dimensions()[0], width = result->dimensions()[1];
  if (result->dimensions()[0] != rows || vocab < 0)
    return Bad("embed: expected a result for each of " + std::to_string(rows) +
               " tokens and a vocabulary of at least 0, found " + Shape(result->dimensions()) + " and " +
               std::to_string(vocab));
  Operands operands("embed", rest);
  const Weight w = TakeWeights(operands, 0, vocab, width).At(0);
  if (!operands.AtEnd()) operands.Fail("more operands than weights take");
  if (operands.error().failure()) return operands.error();
  for (int64_t r = 0; r < rows; ++r)
    if (const int64_t token = tokens.typed_data()[r]; token < 0 || token >= vocab)
      return Bad("embed: token " + std::to_string(token) + " is outside the vocabulary of " + std::to_string(vocab));
  Team(pool).For((rows + kEmbedRows - 1) / kEmbedRows, [&](int64_t task) {
    for (int64_t r = task * kEmbedRows; r < std::min(rows, (task + 1) * kEmbedRows); ++r)
      for (int64_t k = 0; k < width; ++k)
        result->typed_data()[r * width + k] = Element(w, tokens.typed_data()[r], k, width);
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(PrecastEmbedV1, Guard<EmbedHandler>::Call,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::BufferR1<ffi::S32>>()
                                  .RemainingArgs()
                                  .Ret<ffi::BufferR2<ffi::F32>>()
                                  .Attr<int64_t>("vocab"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(PrecastLinearV1, Guard<LinearHandler>::Call,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::BufferR2<ffi::F32>>()
                                  .Arg<ffi::BufferR0<ffi::S32>>()
                                  .Arg<ffi::BufferR0<ffi::S32>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<bool>("norm")
                                  .Attr<float>("eps")
                                  .Attr<bool>("residual")
                                  .Attr<bool>("bias")
                                  .Attr<std::string_view>("gate"));

}  // namespace precast
