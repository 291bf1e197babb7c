// The XLA-FFI handlers: check every argument, then split the work over XLA's thread pool.
#include "ffi.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "ops.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace precast {
namespace {

namespace ffi = xla::ffi;

using Floats = ffi::AnyBuffer;
using Ints = ffi::BufferR1<ffi::S32>;
using Scalar = ffi::BufferR0<ffi::S32>;

// Bytes of weights a task streams: large enough to hide the cost of drawing it, small enough to share evenly.
constexpr int64_t kTaskBytes = 128 * 1024;
// Outputs of a task are a multiple of this: of every kColumns, so that blocks come out even.
constexpr int64_t kTaskOutputs = 24;
// Query rows (tokens times group) of an attention task.
constexpr int64_t kAttentionRows = 24;
// Positions of an attention task when a call brings few tokens; a constant, so that results do not depend on the
// number of threads.
constexpr int64_t kSpan = 256;

ffi::Error Bad(const std::string& what) { return ffi::Error(ffi::ErrorCode::kInvalidArgument, "precast: " + what); }

std::string Shape(ffi::AnyBuffer::Dimensions dims) {
  std::string text = "[";
  for (size_t i = 0; i < dims.size(); ++i) text += (i ? ", " : "") + std::to_string(dims[i]);
  return text + "]";
}

bool IsFloat(const ffi::AnyBuffer& buffer, size_t rank) {
  return buffer.element_type() == ffi::F32 && buffer.dimensions().size() == rank;
}

struct Product {
  const float* w;
  int64_t outs, chunk, first_task;
  float* y;
};

ffi::Error MatmulHandler(ffi::ThreadPool pool, ffi::BufferR2<ffi::F32> x, Scalar layer, Scalar true_rows,
                         ffi::RemainingArgs weights, ffi::RemainingRets results) {
  const int64_t rows = x.dimensions()[0], in = x.dimensions()[1];
  const int64_t index = layer.typed_data()[0], used = true_rows.typed_data()[0];
  if (used < 0 || used > rows)
    return Bad("matmul: " + std::to_string(used) + " true rows of x " + Shape(x.dimensions()));
  if (weights.size() == 0 || weights.size() != results.size())
    return Bad("matmul: expected as many results as weights and at least one, found " +
               std::to_string(results.size()) + " and " + std::to_string(weights.size()));
  std::vector<Product> products;
  int64_t tasks = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    auto w = weights.get<ffi::AnyBuffer>(i);
    auto y = results.get<ffi::AnyBuffer>(i);
    if (!w.has_value() || !y.has_value() || !IsFloat(*w, 3) || !IsFloat(**y, 2))
      return Bad("matmul: expected float32 weights of 3 axes and results of 2 axes at place " + std::to_string(i));
    const auto shape = w->dimensions();
    const auto result = (*y)->dimensions();
    if (shape[2] != in || result[0] != rows || result[1] != shape[1])
      return Bad("matmul: x " + Shape(x.dimensions()) + ", weights " + Shape(shape) + " and result " +
                 Shape(result) + " do not fit together");
    if (index < 0 || index >= shape[0])
      return Bad("matmul: layer " + std::to_string(index) + " of weights " + Shape(shape));
    const int64_t row_bytes = std::max<int64_t>(in * 4, 1);
    const int64_t chunk = std::max(kTaskOutputs, kTaskBytes / row_bytes / kTaskOutputs * kTaskOutputs);
    products.push_back({reinterpret_cast<const float*>(w->untyped_data()) + index * shape[1] * in, shape[1], chunk,
                        tasks, reinterpret_cast<float*>((*y)->untyped_data())});
    tasks += (shape[1] + chunk - 1) / chunk;
  }
  const Ops& ops = CurrentOps();
  ParallelFor(pool, tasks, [&](int64_t task) {
    size_t i = products.size() - 1;
    while (task < products[i].first_task) --i;
    const Product& p = products[i];
    const int64_t o = (task - p.first_task) * p.chunk;
    ops.matmul(x.typed_data(), used, in, p.w + o * in, std::min(p.chunk, p.outs - o), p.y + o, p.outs);
  });
  // Padding costs no products; it is zero, so that nothing downstream reads what was never written.
  for (const Product& p : products) std::fill(p.y + used * p.outs, p.y + rows * p.outs, 0.0f);
  return ffi::Error::Success();
}

struct AttentionShape {
  int64_t R, T, N, K, H, L, B, S;
  int64_t cache_row() const { return S * H; }
};

ffi::Error CheckRows(const AttentionShape& d, const Ints& slots, const Ints& starts, const Ints& lengths) {
  if (slots.dimensions()[0] != d.R || starts.dimensions()[0] != d.R || lengths.dimensions()[0] != d.R)
    return Bad("attention: expected slots, starts and lengths of shape [" + std::to_string(d.R) + "]");
  std::vector<char> used(static_cast<size_t>(d.B), 0);
  for (int64_t r = 0; r < d.R; ++r) {
    const int64_t slot = slots.typed_data()[r], start = starts.typed_data()[r], length = lengths.typed_data()[r];
    if (length == 0) continue;
    if (slot < 0 || slot >= d.B || start < 0 || length < 0 || length > d.T || start + length > d.S)
      return Bad("attention: sequence " + std::to_string(r) + " of slot " + std::to_string(slot) + ", start " +
                 std::to_string(start) + " and length " + std::to_string(length) + " does not fit " +
                 std::to_string(d.B) + " slots of " + std::to_string(d.S) + " positions and " +
                 std::to_string(d.T) + " tokens");
    if (used[static_cast<size_t>(slot)]++) return Bad("attention: two sequences in slot " + std::to_string(slot));
  }
  return ffi::Error::Success();
}

void Append(const AttentionShape& d, int64_t length, const float* from, float* cache) {
  for (int64_t t = 0; t < length; ++t)
    for (int64_t k = 0; k < d.K; ++k)
      std::memcpy(cache + k * d.cache_row() + t * d.H, from + (t * d.K + k) * d.H,
                  static_cast<size_t>(d.H) * sizeof(float));
}

// out[row] = sum over spans of exp(peak - top) * partial, divided by the mass of all: the merge of softmaxes.
void Merge(const AttentionPartial* partials, int64_t spans, int64_t row, int64_t H, float* out) {
  float top = -INFINITY;
  for (int64_t s = 0; s < spans; ++s)
    if (partials[s].mass[row] != 0.0f) top = std::max(top, partials[s].peak[row]);
  float mass = 0.0f;
  for (int64_t h = 0; h < H; ++h) out[h] = 0.0f;
  for (int64_t s = 0; s < spans; ++s) {
    if (partials[s].mass[row] == 0.0f) continue;
    const float share = std::exp(partials[s].peak[row] - top);
    mass += share * partials[s].mass[row];
    for (int64_t h = 0; h < H; ++h) out[h] += share * partials[s].out[row * H + h];
  }
  for (int64_t h = 0; h < H; ++h) out[h] /= mass;
}

struct AttentionCall {
  AttentionShape d;
  const float *q, *keys, *values;
  float* out;
  int64_t layer;
  float scale;
};

// One task: a block of tokens of one sequence and key/value head, against all the positions they see.
void AttendBlock(ffi::ThreadPool& pool, const Ops& ops, const AttentionCall& c, int64_t r, int64_t slot,
                 int64_t start, int64_t length) {
  const AttentionShape& d = c.d;
  const int64_t group = d.N / d.K;
  const int64_t block = std::max<int64_t>(1, kAttentionRows / group);
  const int64_t blocks = (length + block - 1) / block;
  // A call of one block per head splits the positions instead: a decode step has as few tasks as heads.
  const int64_t span = blocks > 1 ? d.S : kSpan;
  const int64_t spans = (start + length + span - 1) / span;
  const int64_t rows = block * group;
  const int64_t partial_floats = rows * (d.H + 2);
  const int64_t units = d.K * blocks;
  std::unique_ptr<float[]> partials(new float[static_cast<size_t>(units * spans * partial_floats)]);
  auto partial = [&](int64_t unit, int64_t s) {
    float* base = partials.get() + (unit * spans + s) * partial_floats;
    return AttentionPartial{base, base + rows * d.H, base + rows * (d.H + 1)};
  };
  auto token_of = [&](int64_t unit) { return unit % blocks * block; };
  ParallelFor(pool, units * spans, [&](int64_t task) {
    const int64_t unit = task / spans, s = task % spans, k = unit / blocks, token = token_of(unit);
    const int64_t head_row = ((c.layer * d.B + slot) * d.K + k) * d.cache_row();
    const AttentionHead head = {c.q + (r * d.T * d.N + k * group) * d.H, d.N * d.H, c.keys + head_row,
                                c.values + head_row, group, d.H, start, c.scale};
    std::unique_ptr<float[]> scratch(new float[static_cast<size_t>(AttentionScratch(rows, d.H))]);
    ops.attention(head, {token, std::min(block, length - token), s * span, (s + 1) * span}, partial(unit, s),
                  scratch.get());
  });
  std::vector<AttentionPartial> of_unit(static_cast<size_t>(spans));
  for (int64_t unit = 0; unit < units; ++unit) {
    for (int64_t s = 0; s < spans; ++s) of_unit[static_cast<size_t>(s)] = partial(unit, s);
    const int64_t k = unit / blocks, token = token_of(unit);
    for (int64_t row = 0; row < std::min(block, length - token) * group; ++row) {
      const int64_t t = token + row / group, n = k * group + row % group;
      Merge(of_unit.data(), spans, row, d.H, c.out + ((r * d.T + t) * d.N + n) * d.H);
    }
  }
}

ffi::Error AttentionHandler(ffi::ThreadPool pool, ffi::BufferR4<ffi::F32> q, ffi::BufferR4<ffi::F32> k,
                            ffi::BufferR4<ffi::F32> v, Floats cache_k, Floats cache_v, Scalar layer, Ints slots,
                            Ints starts, Ints lengths, ffi::ResultBufferR4<ffi::F32> out,
                            ffi::Result<ffi::AnyBuffer> new_k, ffi::Result<ffi::AnyBuffer> new_v, float scale) {
  if (!IsFloat(cache_k, 5) || !IsFloat(cache_v, 5) || !IsFloat(*new_k, 5) || !IsFloat(*new_v, 5))
    return Bad("attention: expected float32 caches of 5 axes [L, B, K, S, H]");
  const auto cache = cache_k.dimensions(), query = q.dimensions(), key = k.dimensions();
  const AttentionShape d = {query[0], query[1], query[2], key[2], query[3], cache[0], cache[1], cache[3]};
  auto same = [](auto a, auto b) { return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin()); };
  if (!same(cache, cache_v.dimensions()) || !same(cache, new_k->dimensions()) ||
      !same(cache, new_v->dimensions()) || !same(key, v.dimensions()) || !same(query, out->dimensions()) ||
      key[0] != d.R || key[1] != d.T || key[3] != d.H || cache[2] != d.K || cache[4] != d.H || d.K < 1 ||
      d.N < 1 || d.N % d.K != 0)
    return Bad("attention: q " + Shape(query) + ", k " + Shape(key) + ", v " + Shape(v.dimensions()) +
               ", caches " + Shape(cache) + " and " + Shape(cache_v.dimensions()) + " do not fit together");
  if (new_k->untyped_data() != cache_k.untyped_data() || new_v->untyped_data() != cache_v.untyped_data())
    return Bad("attention: the cache results must alias the cache arguments");
  const int64_t index = layer.typed_data()[0];
  if (index < 0 || index >= d.L) return Bad("attention: layer " + std::to_string(index) + " of " + Shape(cache));
  if (ffi::Error error = CheckRows(d, slots, starts, lengths); error.failure()) return error;

  auto* keys = reinterpret_cast<float*>(new_k->untyped_data());
  auto* values = reinterpret_cast<float*>(new_v->untyped_data());
  const AttentionCall call = {d, q.typed_data(), keys, values, out->typed_data(), index, scale};
  const Ops& ops = CurrentOps();
  for (int64_t r = 0; r < d.R; ++r) {
    const int64_t slot = slots.typed_data()[r], start = starts.typed_data()[r], length = lengths.typed_data()[r];
    float* padding = call.out + (r * d.T + length) * d.N * d.H;
    std::fill(padding, padding + (d.T - length) * d.N * d.H, 0.0f);
    if (length == 0) continue;
    const int64_t place = (index * d.B + slot) * d.K * d.cache_row() + start * d.H;
    Append(d, length, k.typed_data() + r * d.T * d.K * d.H, keys + place);
    Append(d, length, v.typed_data() + r * d.T * d.K * d.H, values + place);
    AttendBlock(pool, ops, call, r, slot, start, length);
  }
  return ffi::Error::Success();
}

// XLA has allocated the results; leaving them alone leaves their pages unmapped until they are written.
ffi::Error ReserveHandler(ffi::RemainingRets) { return ffi::Error::Success(); }

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(PrecastMatmulV1, MatmulHandler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::BufferR2<ffi::F32>>()
                                  .Arg<Scalar>()
                                  .Arg<Scalar>()
                                  .RemainingArgs()
                                  .RemainingRets());

XLA_FFI_DEFINE_HANDLER_SYMBOL(PrecastAttentionV1, AttentionHandler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::BufferR4<ffi::F32>>()
                                  .Arg<ffi::BufferR4<ffi::F32>>()
                                  .Arg<ffi::BufferR4<ffi::F32>>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Scalar>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Ret<ffi::BufferR4<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("scale"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(PrecastReserveV1, ReserveHandler, ffi::Ffi::Bind().RemainingRets());

}  // namespace precast
