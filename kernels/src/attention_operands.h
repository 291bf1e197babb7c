// The operands of attention that follow q, k, v, cos and sin, and their checks.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "attention_call.h"
#include "ffi_util.h"

namespace precast {

inline bool Same(ffi::AnyBuffer::Dimensions a, ffi::AnyBuffer::Dimensions b) {
  return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin());
}

inline bool IsOf(const ffi::AnyBuffer& buffer, ffi::DataType type, size_t rank) {
  return buffer.element_type() == type && buffer.dimensions().size() == rank;
}

// The operands after cos and sin, and the results after `out`, in order.
struct AttentionOperands {
  std::vector<ffi::AnyBuffer> caches, results;  // keys, values, and for int8 the scales of each
  std::vector<ffi::AnyBuffer> integers;         // layer, slots, starts, lengths
};

inline ffi::Error CheckCaches(const AttentionOperands& rest) {
  const auto& caches = rest.caches;
  const ffi::DataType type = caches[0].element_type();
  if ((type != ffi::F32 && type != ffi::BF16 && type != ffi::S8) || !IsOf(caches[0], type, 5) ||
      !IsOf(caches[1], type, 5))
    return Bad("attention: expected keys and values [L, B, K, S, H], both float32, both bfloat16 or both int8");
  if (const auto dims = caches[0].dimensions(); dims[1] < 1 || dims[3] < 1)
    return Bad("attention: expected caches of at least one slot and one position, found " + Shape(dims));
  for (size_t i = 0; i < caches.size(); ++i) {
    const auto axes = caches[i < 2 ? 0 : i].dimensions(), cache = caches[0].dimensions();
    if (i >= 2 && (!IsOf(caches[i], ffi::F32, 4) || !std::equal(axes.begin(), axes.end(), cache.begin())))
      return Bad("attention: expected float32 scales [L, B, K, S] for caches " + Shape(cache) + ", found " +
                 Shape(axes));
    if (!IsOf(rest.results[i], caches[i].element_type(), caches[i].dimensions().size()) ||
        !Same(rest.results[i].dimensions(), caches[i].dimensions()))
      return Bad("attention: expected cache result " + std::to_string(i) + " to match its argument, " +
                 TypeName(caches[i].element_type()) + " " + Shape(caches[i].dimensions()) + ", found " +
                 TypeName(rest.results[i].element_type()) + " " + Shape(rest.results[i].dimensions()));
    if (rest.results[i].untyped_data() != caches[i].untyped_data())
      return Bad("attention: the cache results must alias the cache arguments");
  }
  return ffi::Error::Success();
}

inline ffi::Error CheckRest(const AttentionShape& d, const AttentionOperands& rest) {
  if (ffi::Error error = CheckCaches(rest); error.failure()) return error;
  for (size_t i = 0; i < 4; ++i)
    if (!IsOf(rest.integers[i], ffi::S32, i > 0 ? 1 : 0))
      return Bad("attention: expected an int32 layer of rank 0, and int32 slots, starts and lengths of rank 1");
  for (size_t i = 1; i < 4; ++i)
    if (rest.integers[i].dimensions()[0] != d.R)
      return Bad("attention: expected slots, starts and lengths of shape [" + std::to_string(d.R) + "]");
  return ffi::Error::Success();
}

// Keys (i = 0) or values (i = 1), writable through the result that aliases them.
inline CacheRows CacheOf(const AttentionOperands& rest, size_t i) {
  const ffi::DataType type = rest.caches[i].element_type();
  float* scales = type == ffi::S8 ? reinterpret_cast<float*>(rest.results[i + 2].untyped_data()) : nullptr;
  const CacheType stored = type == ffi::S8     ? CacheType::kInt8
                           : type == ffi::BF16 ? CacheType::kBfloat16
                                               : CacheType::kFloat32;
  return {.type = stored, .rows = reinterpret_cast<char*>(rest.results[i].untyped_data()), .scales = scales};
}

}  // namespace precast
