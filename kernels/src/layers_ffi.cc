// precast.layers: all layers of a decoder in one call. The steps of a layer are products, norms, mixtures and
// attention (layers_parser.h says how they are spelt); the threads stay together from the first step to the last, which
// is what a step of a few microseconds needs.
//
// Operands: x, the number of true rows, cos and sin of Z rotary tables; for each distinct window, ascending, the caches
// of the layers that have it; slots, starts, lengths; what the steps take. A layer's window and table stand in `windows`
// and `ropes`.
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

// Numbers of all values together; far more than memory holds, and far less than an integer does.
constexpr int64_t kMostNumbers = int64_t{1} << 42;

// The distinct windows, ascending: each has a cache.
std::vector<int64_t> Distinct(Integers windows) {
  std::vector<int64_t> distinct(windows.begin(), windows.end());
  std::sort(distinct.begin(), distinct.end());
  distinct.erase(std::unique(distinct.begin(), distinct.end()), distinct.end());
  return distinct;
}

// For each layer the group of its window, and how many layers before it are of that group.
std::vector<LayerPlace> Places(Integers windows, Integers ropes, const std::vector<int64_t>& distinct) {
  std::vector<int64_t> seen(distinct.size(), 0);
  std::vector<LayerPlace> places;
  for (size_t i = 0; i < windows.size(); ++i) {
    const auto found = std::lower_bound(distinct.begin(), distinct.end(), windows[i]);
    const auto group = static_cast<size_t>(found - distinct.begin());
    places.push_back({group, seen[group]++, ropes[i]});
  }
  return places;
}

ffi::Error CheckLayers(Integers heads, Integers windows, Integers ropes, int64_t tables) {
  if (heads.size() != 3 || heads[0] < 1 || heads[1] < 1 || heads[2] < 1 || heads[0] % heads[1] != 0)
    return Bad("layers: expected heads to be N, K and H, N a multiple of K");
  if (windows.size() == 0 || windows.size() != ropes.size())
    return Bad("layers: expected a window and a rotary table for each layer, found " + std::to_string(windows.size()) +
               " and " + std::to_string(ropes.size()));
  for (size_t i = 0; i < windows.size(); ++i)
    if (windows[i] < 0 || ropes[i] < 0 || ropes[i] >= tables)
      return Bad("layers: layer " + std::to_string(i) + " of window " + std::to_string(windows[i]) +
                 " and rotary table " + std::to_string(ropes[i]) + " of " + std::to_string(tables));
  return ffi::Error::Success();
}

// cos and sin [Z, R, T, P] for M = R T rows, and what comes out as large as what goes in.
ffi::Error CheckRows(const Floats2& x, const Floats2& y, const Floats4& cos, const Floats4& sin, int64_t head_dim) {
  const auto angles = cos.dimensions();
  const int64_t all = x.dimensions()[0], R = angles[1], T = angles[2];
  const bool rows = T == 0 ? all == 0 : all % T == 0 && all / T == R;  // R T may be more than a number holds
  if (x.dimensions()[1] < 1 || !Same(x.dimensions(), y.dimensions()) || !Same(angles, sin.dimensions()) || !rows ||
      angles[3] > head_dim / 2)
    return Bad("layers: x " + Shape(x.dimensions()) + ", result " + Shape(y.dimensions()) + ", cos " + Shape(angles) +
               " and sin " + Shape(sin.dimensions()) + " do not fit together");
  return ffi::Error::Success();
}

// The caches of one group: the next `count` operands, and results from `first` on.
ffi::Error TakeGroup(Operands& operands, const ffi::RemainingRets& results, size_t first, size_t count,
                     Integers heads, CacheGroup& group) {
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
    return Bad("layers: int8 caches come with key and value scales, others without");
  if (ffi::Error error = CheckCaches(taken); error.failure()) return error;
  if (cache[0] != group.layers || cache[2] != heads[1] || cache[4] != heads[2] ||
      !Same(cache, taken.caches[1].dimensions()))
    return Bad("layers: caches " + Shape(cache) + " and " + Shape(taken.caches[1].dimensions()) + " are not of " +
               std::to_string(group.layers) + " layers and these heads");
  group.slots = cache[1], group.places = cache[3];
  group.keys = CacheOf(taken, 0), group.values = CacheOf(taken, 1);
  return ffi::Error::Success();
}

ffi::Error TakeGroups(Operands& operands, const ffi::RemainingRets& results, Integers heads,
                      const std::vector<int64_t>& windows, Program& program) {
  const size_t each = results.size() / windows.size();
  if (results.size() != windows.size() * each || (each != 2 && each != 4))
    return Bad("layers: expected 2 caches, or 4 with scales, as results for each of " +
               std::to_string(windows.size()) + " windows, found " + std::to_string(results.size()));
  for (size_t i = 0; i < windows.size(); ++i) {
    CacheGroup group = {windows[i], 0, 0, 0, {}, {}};
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
    return Bad("layers: " + std::to_string(used) + " true rows of x " + Shape(x.dimensions()));
  if (ffi::Error error = CheckRows(x, *y, cos, sin, heads[2]); error.failure()) return error;
  const std::vector<int64_t> distinct = Distinct(windows);
  Program program = {used, {{x.dimensions()[1], nullptr}}, {}, {}, {}, Places(windows, ropes, distinct)};
  Operands operands("layers", rest);
  if (ffi::Error error = TakeGroups(operands, results, heads, distinct, program); error.failure()) return error;
  const int32_t* rows[3];
  for (const int32_t*& of : rows) of = operands.Take<int32_t>("slots, starts or lengths", ffi::S32, {R});
  if (operands.error().failure()) return operands.error();
  // Attention reads what the products wrote, and they write no row of padding.
  for (int64_t r = 0; r < R; ++r)
    if (rows[2][r] > 0 && r * T + rows[2][r] > used)
      return Bad("layers: sequence " + std::to_string(r) + " of length " + std::to_string(rows[2][r]) +
                 " ends behind the " + std::to_string(used) + " true rows");
  program.attention = {{R, T, heads[0], heads[1], heads[2], angles[3], 0, 0, 0},
                       nullptr, nullptr, nullptr, cos.typed_data(), sin.typed_data(), {}, {},
                       0, rows[0], rows[1], rows[2], nullptr, 0.0f, 0.0f, 0};
  Parser({steps, outs, numbers}, operands, program).Parse();
  if (operands.error().failure()) return operands.error();
  int64_t width = 0;
  for (const Value& value : program.values)
    if (value.width > kMostNumbers || (width += value.width) > kMostNumbers / std::max<int64_t>(all, 1))
      return Bad("layers: " + std::to_string(all) + " rows of values this wide are more than any machine holds");
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
