// precast.layers: all layers of a decoder in one call. The steps of a layer are products, norms, mixtures and
// attention (step_codes.h defines their codes). One team of threads runs from the first step to the last, because
// waking threads would take longer than a step of a few microseconds.
//
// Operands: x, the number of true rows, cos and sin of Z rotary tables; for each distinct window, in ascending order,
// the caches of its layers; slots, starts, lengths; the operands of the steps. The attributes `windows` and `ropes`
// state the window and the rotary table of each layer.
#include <algorithm>
#include <string>
#include <vector>

#include "attention_operands.h"
#include "ffi.h"
#include "layers_parser.h"

namespace precast {
namespace {

using Scalar = ffi::BufferR0<ffi::S32>;
using Floats2 = ffi::BufferR2<ffi::F32>;
using Floats4 = ffi::BufferR4<ffi::F32>;

// Limit on the sum of the sizes of all values: more than fits into memory, and so small that no product overflows.
constexpr int64_t kMostNumbers = int64_t{1} << 42;

// The distinct windows in ascending order; each has a cache.
std::vector<int64_t> Distinct(Integers windows) {
  std::vector<int64_t> distinct(windows.begin(), windows.end());
  std::sort(distinct.begin(), distinct.end());
  distinct.erase(std::unique(distinct.begin(), distinct.end()), distinct.end());
  return distinct;
}

// The place of each layer: the group of its window, and its index among the layers of that group.
std::vector<LayerPlace> Places(Integers windows, Integers ropes, const std::vector<int64_t>& distinct) {
  std::vector<int64_t> seen(distinct.size(), 0);
  std::vector<LayerPlace> places;
  for (size_t i = 0; i < windows.size(); ++i) {
    const auto found = std::lower_bound(distinct.begin(), distinct.end(), windows[i]);
    const auto group = static_cast<size_t>(found - distinct.begin());
    places.push_back({.group = group, .place = seen[group]++, .rope = ropes[i]});
  }
  return places;
}

ffi::Error CheckLayers(Integers heads, Integers windows, Integers ropes, int64_t tables) {
  if (heads.size() != 3 || heads[0] < 1 || heads[1] < 1 || heads[2] < 1 || heads[0] % heads[1] != 0)
    return Bad("layers: expected heads to be N, K and H, with N a multiple of K");
  if (windows.size() == 0 || windows.size() != ropes.size())
    return Bad("layers: expected a window and a rotary table for each layer, found " + std::to_string(windows.size()) +
               " and " + std::to_string(ropes.size()));
  for (size_t i = 0; i < windows.size(); ++i)
    if (windows[i] < 0 || ropes[i] < 0 || ropes[i] >= tables)
      return Bad("layers: layer " + std::to_string(i) + ": expected a window of at least 0 and one of " +
                 std::to_string(tables) + " rotary tables, found " + std::to_string(windows[i]) + " and " +
                 std::to_string(ropes[i]));
  return ffi::Error::Success();
}

// Check cos and sin [Z, R, T, P] against M = R T rows, and the result against x.
ffi::Error CheckRows(const Floats2& x, const Floats2& y, const Floats4& cos, const Floats4& sin, int64_t head_dim) {
  const auto angles = cos.dimensions();
  const int64_t all = x.dimensions()[0], R = angles[1], T = angles[2];
  const bool rows = T == 0 ? all == 0 : all % T == 0 && all / T == R;  // R T may overflow
  if (x.dimensions()[1] < 1 || !Same(x.dimensions(), y.dimensions()) || !Same(angles, sin.dimensions()) || !rows ||
      angles[3] > head_dim / 2)
    return Bad("layers: x " + Shape(x.dimensions()) + ", result " + Shape(y.dimensions()) + ", cos " + Shape(angles) +
               " and sin " + Shape(sin.dimensions()) + " do not fit together");
  return ffi::Error::Success();
}

// Take the caches of one group: the next `count` operands, and `count` results, beginning with result `first`.
ffi::Error TakeGroup(Operands& operands, const ffi::RemainingRets& results, size_t first, size_t count, Integers heads,
                     CacheGroup& group) {
  AttentionOperands taken;
  for (size_t i = 0; i < count; ++i) {
    auto result = results.get<ffi::AnyBuffer>(first + i);
    const auto operand = operands.Next("cache");
    if (!result.has_value() || !operand.has_value()) return Bad("layers: too few caches");
    taken.caches.push_back(*operand);
    taken.results.push_back(**result);
  }
  const auto cache = taken.caches[0].dimensions();
  if ((taken.caches[0].element_type() == ffi::S8) != (count == 4))
    return Bad("layers: int8 caches need key and value scales, other caches take none");
  if (ffi::Error error = CheckCaches(taken); error.failure()) return error;
  if (cache[0] != group.layers || cache[2] != heads[1] || cache[4] != heads[2] ||
      !Same(cache, taken.caches[1].dimensions()))
    return Bad("layers: expected keys and values [" + std::to_string(group.layers) + ", B, " +
               std::to_string(heads[1]) + ", S, " + std::to_string(heads[2]) + "], found " + Shape(cache) + " and " +
               Shape(taken.caches[1].dimensions()));
  group.slots = cache[1];
  group.places = cache[3];
  group.keys = CacheOf(taken, 0);
  group.values = CacheOf(taken, 1);
  return ffi::Error::Success();
}

ffi::Error TakeGroups(Operands& operands, const ffi::RemainingRets& results, Integers heads,
                      const std::vector<int64_t>& windows, Program& program) {
  const size_t each = results.size() / windows.size();
  if (results.size() != windows.size() * each || (each != 2 && each != 4))
    return Bad("layers: expected 2 cache results, or 4 with scales, for each of " + std::to_string(windows.size()) +
               " windows, found " + std::to_string(results.size()));
  for (size_t i = 0; i < windows.size(); ++i) {
    CacheGroup group = {.window = windows[i]};
    for (const LayerPlace& layer : program.layers) group.layers += layer.group == i;
    if (ffi::Error error = TakeGroup(operands, results, i * each, each, heads, group); error.failure()) return error;
    if (i > 0 && group.keys.type != program.groups[0].keys.type)
      return Bad("layers: expected the caches of all windows to be of one type");
    program.groups.push_back(group);
  }
  return ffi::Error::Success();
}

ffi::Error LayersHandler(ffi::ThreadPool pool, Floats2 x, Scalar true_rows, Floats4 cos, Floats4 sin,
                         ffi::RemainingArgs rest, ffi::Result<Floats2> y, ffi::RemainingRets results, Integers heads,
                         Integers windows, Integers ropes, Integers steps, Integers outs,
                         ffi::Span<const float> numbers) {
  const auto angles = cos.dimensions();
  const int64_t all = x.dimensions()[0], R = angles[1], T = angles[2];
  const int64_t used = true_rows.typed_data()[0];
  if (ffi::Error error = CheckLayers(heads, windows, ropes, angles[0]); error.failure()) return error;
  if (used < 0 || used > all)
    return Bad("layers: expected 0 to " + std::to_string(all) + " true rows, found " + std::to_string(used));
  if (ffi::Error error = CheckRows(x, *y, cos, sin, heads[2]); error.failure()) return error;
  const std::vector<int64_t> distinct = Distinct(windows);
  Program program = {
      .rows = used, .values = {{.width = x.dimensions()[1]}}, .layers = Places(windows, ropes, distinct)};
  Operands operands("layers", rest);
  if (ffi::Error error = TakeGroups(operands, results, heads, distinct, program); error.failure()) return error;
  const int32_t* rows[3];
  for (const int32_t*& of : rows) of = operands.Take<int32_t>("slots, starts or lengths", ffi::S32, {R});
  if (operands.error().failure()) return operands.error();
  // Attention reads rows that the products wrote, and the products leave rows of padding unwritten.
  for (int64_t r = 0; r < R; ++r)
    if (rows[2][r] > 0 && r * T + rows[2][r] > used)
      return Bad("layers: sequence " + std::to_string(r) + " of length " + std::to_string(rows[2][r]) +
                 " ends after the " + std::to_string(used) + " true rows");
  program.attention = {.d = {.R = R, .T = T, .N = heads[0], .K = heads[1], .H = heads[2], .P = angles[3]},
                       .cos = cos.typed_data(),
                       .sin = sin.typed_data(),
                       .slots = rows[0],
                       .starts = rows[1],
                       .lengths = rows[2]};
  Parser({steps, outs, numbers}, operands, program).Parse();
  if (operands.error().failure()) return operands.error();
  int64_t width = 0;
  for (const Value& value : program.values)
    if (value.width > kMostNumbers || (width += value.width) > kMostNumbers / std::max<int64_t>(all, 1))
      return Bad("layers: the values of " + std::to_string(all) + " rows exceed the memory of any machine");
  Team team(pool);
  RunLayers(team, program, all, x.typed_data(), y->typed_data());
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(PrecastLayersV2, Guard<LayersHandler>::Call,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats2>()
                                  .Arg<Scalar>()
                                  .Arg<Floats4>()
                                  .Arg<Floats4>()
                                  .RemainingArgs()
                                  .Ret<Floats2>()
                                  .RemainingRets()
                                  .Attr<Integers>("heads")
                                  .Attr<Integers>("windows")
                                  .Attr<Integers>("ropes")
                                  .Attr<Integers>("steps")
                                  .Attr<Integers>("outs")
                                  .Attr<ffi::Span<const float>>("numbers"));

}  // namespace precast
