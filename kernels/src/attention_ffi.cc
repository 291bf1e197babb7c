// precast.attention: rotates queries and keys, appends keys and values to the cache, and attends.
#include <algorithm>
#include <string>
#include <vector>

#include "attention_operands.h"
#include "ffi.h"
#include "ffi_util.h"

namespace precast {
namespace {

using Floats4 = ffi::BufferR4<ffi::F32>;
using Floats3 = ffi::BufferR3<ffi::F32>;

// Check that all shapes fit, then append and attend.
ffi::Error CheckAndAttend(ffi::ThreadPool& pool, const Floats4& q, const Floats4& k, const Floats4& v,
                          const Floats3& cos, const Floats3& sin, const AttentionOperands& rest, const Floats4& out,
                          float scale, int64_t window, float soft_cap) {
  const auto cache = rest.caches[0].dimensions(), query = q.dimensions(), key = k.dimensions();
  AttentionShape d = {.R = query[0], .T = query[1], .N = query[2], .K = key[2], .H = query[3]};
  if (ffi::Error error = CheckRest(d, rest); error.failure()) return error;
  d.L = cache[0];
  d.B = cache[1];
  d.S = cache[3];
  if (!Same(cache, rest.caches[1].dimensions()) || !Same(key, v.dimensions()) || !Same(query, out.dimensions()) ||
      key[0] != d.R || key[1] != d.T || key[3] != d.H || cache[2] != d.K || cache[4] != d.H || d.K < 1 || d.N < 1 ||
      d.N % d.K != 0)
    return Bad("attention: q " + Shape(query) + ", k " + Shape(key) + ", v " + Shape(v.dimensions()) + ", caches " +
               Shape(cache) + " and " + Shape(rest.caches[1].dimensions()) + " do not fit together");
  const auto angles = cos.dimensions();
  d.P = angles[2];
  if (!Same(angles, sin.dimensions()) || angles[0] != d.R || angles[1] != d.T || 2 * d.P > d.H)
    return Bad("attention: cos " + Shape(angles) + " and sin " + Shape(sin.dimensions()) + " do not fit q " +
               Shape(query));
  auto integers = [&](size_t i) { return reinterpret_cast<const int32_t*>(rest.integers[i].untyped_data()); };
  const AttentionCall call = {.d = d,
                              .q = q.typed_data(),
                              .k = k.typed_data(),
                              .v = v.typed_data(),
                              .cos = cos.typed_data(),
                              .sin = sin.typed_data(),
                              .keys = CacheOf(rest, 0),
                              .values = CacheOf(rest, 1),
                              .layer = integers(0)[0],
                              .slots = integers(1),
                              .starts = integers(2),
                              .lengths = integers(3),
                              .out = out.typed_data(),
                              .scale = scale,
                              .soft_cap = soft_cap,
                              .window = window};
  if (const std::string error = CheckAttention(call); !error.empty()) return Bad(error);
  Team team(pool);
  RunAttention(team, call);
  return ffi::Error::Success();
}

ffi::Error AttentionHandler(ffi::ThreadPool pool, Floats4 q, Floats4 k, Floats4 v, Floats3 cos, Floats3 sin,
                            ffi::RemainingArgs arguments, ffi::ResultBufferR4<ffi::F32> out, ffi::RemainingRets results,
                            float scale, int64_t window, float soft_cap) {
  const size_t caches = results.size();
  if ((caches != 2 && caches != 4) || arguments.size() != caches + 4)
    return Bad(
        "attention: expected 2 caches, or 4 with the scales of int8 caches, then layer, slots, starts and "
        "lengths, and a result for each cache; found " +
        std::to_string(arguments.size()) + " operands and " + std::to_string(caches) + " results");
  AttentionOperands rest;
  for (auto* buffers : {&rest.caches, &rest.results, &rest.integers}) buffers->reserve(4);
  for (size_t i = 0; i < arguments.size(); ++i) {
    auto buffer = arguments.get<ffi::AnyBuffer>(i);
    if (!buffer.has_value()) return Bad("attention: operand " + std::to_string(i) + " behind sin is not a buffer");
    (i < caches ? rest.caches : rest.integers).push_back(*buffer);
  }
  for (size_t i = 0; i < caches; ++i) {
    auto buffer = results.get<ffi::AnyBuffer>(i);
    if (!buffer.has_value()) return Bad("attention: result " + std::to_string(i) + " behind out is not a buffer");
    rest.results.push_back(**buffer);
  }
  if ((rest.caches[0].element_type() == ffi::S8) != (caches == 4))
    return Bad("attention: int8 caches need key and value scales, other caches take none");
  return CheckAndAttend(pool, q, k, v, cos, sin, rest, *out, scale, window, soft_cap);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(PrecastAttentionV2, Guard<AttentionHandler>::Call,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats4>()
                                  .Arg<Floats4>()
                                  .Arg<Floats4>()
                                  .Arg<Floats3>()
                                  .Arg<Floats3>()
                                  .RemainingArgs()
                                  .Ret<Floats4>()
                                  .RemainingRets()
                                  .Attr<float>("scale")
                                  .Attr<int64_t>("window")
                                  .Attr<float>("soft_cap"));

}  // namespace precast
