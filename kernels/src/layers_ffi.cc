// precast.layers: all layers of a decoder in one call. The steps of a layer are linear calls and calls of attention; the
// threads stay together from the first step to the last, which is what a step of a few microseconds needs.
#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "attention_operands.h"
#include "ffi.h"
#include "operands.h"

namespace precast {
namespace {

using Scalar = ffi::BufferR0<ffi::S32>;
using Floats2 = ffi::BufferR2<ffi::F32>;
using Floats3 = ffi::BufferR3<ffi::F32>;
using Integers = ffi::Span<const int64_t>;

// How the attribute `steps` spells a step: eight integers. A value is a number: 0 is what a layer is given, and every
// step adds its results.
//   linear:    kLinear, x, residual or -1, norm, bias, gate, weights, 0; takes `weights` widths from `outs`
//   attention: kAttention, q, k, v, window, 0, 0, 0
constexpr int64_t kStepLength = 8;
enum Kind : int64_t { kLinear = 0, kAttention = 1 };

struct Value {
  int64_t width;
  float* data;  // [M, width]
};

struct Step {
  Kind kind;
  std::vector<int64_t> inputs;  // linear: x and, if any, the residual; attention: q, k, v
  size_t first_result;
  LinearCall first, last;  // linear: of the first layer and of the last; the others lie between, evenly
  AttentionCall attention;
};

// Everything a call is made of, checked; nothing in it has been run.
struct Program {
  int64_t rows;
  std::vector<Value> values;
  std::vector<Step> steps;
};

struct Attributes {
  int64_t layers;
  Integers heads, steps, outs;
  ffi::Span<const float> numbers;  // two a step: eps and 0, or scale and soft_cap
};

class Parser {
 public:
  Parser(const Attributes& a, int64_t used, int64_t width, Operands& operands, const AttentionCall& attention)
      : a_(a), operands_(operands), attention_(attention), program_{used, {{width, nullptr}}, {}} {}

  Program Parse() {
    const size_t count = a_.steps.size() / kStepLength;
    if (a_.layers < 1 || a_.steps.size() % kStepLength != 0 || count == 0 || a_.numbers.size() != 2 * count)
      Fail("expected layers, and steps of eight integers and two numbers each");
    for (size_t i = 0; i < count && !failed(); ++i) {
      const int64_t* code = a_.steps.begin() + i * kStepLength;
      const float* numbers = a_.numbers.begin() + 2 * i;
      if (code[0] == kLinear) Linear(code, numbers[0]);
      else if (code[0] == kAttention) Attention(code, numbers[0], numbers[1]);
      else Fail("step of unknown kind " + std::to_string(code[0]));
    }
    if (!operands_.AtEnd()) Fail("more operands than the steps take");
    if (next_out_ != a_.outs.size()) Fail("more widths than the steps have weights");
    if (!failed() && program_.values.back().width != program_.values[0].width)
      Fail("the last step's result is not as wide as what a layer is given");
    return std::move(program_);
  }

 private:
  bool failed() const { return operands_.error().failure(); }
  void Fail(const std::string& what) { operands_.Fail(what); }

  bool Known(int64_t value) {
    if (value >= 0 && value < static_cast<int64_t>(program_.values.size())) return true;
    Fail("value " + std::to_string(value) + " is not known yet");
    return false;
  }
  int64_t Width(int64_t value) const { return program_.values[static_cast<size_t>(value)].width; }

  void Linear(const int64_t* code, float eps) {
    const int64_t x = code[1], residual = code[2], gate = code[5], weights = code[6];
    if (!Known(x) || (residual != -1 && !Known(residual))) return;
    const bool gated = gate != static_cast<int64_t>(Gate::kNone);
    if (gate < 0 || gate > static_cast<int64_t>(Gate::kGeluTanh) || weights < 1 || weights > 64 ||
        next_out_ + static_cast<size_t>(weights) > a_.outs.size() || (gated && weights != 2) ||
        (residual != -1 && weights != (gated ? 2 : 1)))
      return Fail("a linear step with gate " + std::to_string(gate) + " and " + std::to_string(weights) + " weights");
    const int64_t in = Width(x);
    const int64_t* outs = a_.outs.begin() + next_out_;
    next_out_ += static_cast<size_t>(weights);
    if ((gated && outs[0] != outs[1]) || *std::min_element(outs, outs + weights) < 1 ||
        (residual != -1 && Width(residual) != outs[0]))
      return Fail("a linear step whose widths do not fit together");
    Step step = {kLinear, {x}, program_.values.size(), {}, {}, {}};
    if (residual != -1) step.inputs.push_back(residual);
    step.first = {program_.rows, in, nullptr, nullptr, eps, nullptr, static_cast<Gate>(gate), {}};
    step.last = step.first;
    const size_t place = operands_.place();
    TakeLinear(code, outs, a_.layers - 1, step.last);
    operands_.Seek(place);
    TakeLinear(code, outs, 0, step.first);
    for (int64_t i = 0; i < (gated ? 1 : weights); ++i) program_.values.push_back({outs[i], nullptr});
    program_.steps.push_back(std::move(step));
  }

  void TakeLinear(const int64_t* code, const int64_t* outs, int64_t layer, LinearCall& c) {
    if (code[3] != 0) c.norm = operands_.TakeLayer<float>("norm", layer, ffi::F32, {c.in});
    for (int64_t i = 0; i < code[6]; ++i) {
      const Weight weight = TakeWeight(operands_, layer, outs[i], c.in);
      const float* bias = code[4] == 0 ? nullptr : operands_.TakeLayer<float>("bias", layer, ffi::F32, {outs[i]});
      c.parts.push_back({weight, bias, nullptr});
    }
  }

  void Attention(const int64_t* code, float scale, float soft_cap) {
    const AttentionShape& d = attention_.d;
    for (int i = 1; i <= 3; ++i) {
      if (!Known(code[i])) return;
      if (Width(code[i]) != (i == 1 ? d.N : d.K) * d.H) return Fail("attention of values that are not heads wide");
    }
    Step step = {kAttention, {code[1], code[2], code[3]}, program_.values.size(), {}, {}, attention_};
    step.attention.window = code[4];
    step.attention.scale = scale;
    step.attention.soft_cap = soft_cap;
    if (const std::string wrong = CheckAttention(step.attention); !wrong.empty()) Fail(wrong);
    program_.values.push_back({d.N * d.H, nullptr});
    program_.steps.push_back(std::move(step));
  }

  const Attributes a_;
  Operands& operands_;
  AttentionCall attention_;
  Program program_;
  size_t next_out_ = 0;
};

// A pointer of one layer, from those of the first and the last.
template <typename T>
const T* Between(const T* first, const T* last, int64_t layer, int64_t layers) {
  if (first == nullptr || layers == 1) return first;
  const auto begin = reinterpret_cast<intptr_t>(first), end = reinterpret_cast<intptr_t>(last);
  return reinterpret_cast<const T*>(begin + (end - begin) / (layers - 1) * layer);
}

void RunStep(Team& team, Arena& arena, const Program& p, const Step& step, int64_t layer, int64_t layers) {
  const auto value = [&](size_t i) { return p.values[i].data; };
  const auto input = [&](size_t i) { return value(static_cast<size_t>(step.inputs[i])); };
  if (step.kind == kAttention) {
    AttentionCall c = step.attention;
    c.layer = layer;
    c.q = input(0), c.k = input(1), c.v = input(2), c.out = value(step.first_result);
    return RunAttention(team, c);
  }
  LinearCall c = step.first;
  const auto at = [&](auto* first, auto* last) { return Between(first, last, layer, layers); };
  c.x = input(0);
  c.residual = step.inputs.size() > 1 ? input(1) : nullptr;
  c.norm = at(step.first.norm, step.last.norm);
  for (size_t i = 0; i < c.parts.size(); ++i) {
    const LinearPart &first = step.first.parts[i], &last = step.last.parts[i];
    Weight& w = c.parts[i].weight;
    w.values = at(static_cast<const char*>(first.weight.values), static_cast<const char*>(last.weight.values));
    w.scale = at(first.weight.scale, last.weight.scale);
    w.minimum = at(first.weight.minimum, last.weight.minimum);
    c.parts[i].bias = at(first.bias, last.bias);
    if (i < c.results()) c.parts[i].y = value(step.first_result + i);
  }
  RunLinear(team, arena, c);
}

void RunLayers(Team& team, Program& p, int64_t layers, int64_t all_rows, const float* x, float* y) {
  int64_t floats = 0;
  for (const Value& value : p.values) floats += RoundUp(all_rows * value.width, 16);
  Arena memory, scratch;
  memory.Reset(floats * 4);
  float* next = memory.Take<float>(floats);
  for (Value& value : p.values) {
    value.data = next;
    next += RoundUp(all_rows * value.width, 16);
  }
  const size_t width = static_cast<size_t>(p.values[0].width);
  std::memcpy(p.values[0].data, x, static_cast<size_t>(p.rows) * width * sizeof(float));
  for (int64_t layer = 0; layer < layers; ++layer) {
    for (const Step& step : p.steps) RunStep(team, scratch, p, step, layer, layers);
    std::swap(p.values.front().data, p.values.back().data);  // what one layer gives, the next is given
  }
  // Padding is zero, so that nothing downstream reads what was never written.
  std::memcpy(y, p.values[0].data, static_cast<size_t>(p.rows) * width * sizeof(float));
  std::fill(y + static_cast<size_t>(p.rows) * width, y + static_cast<size_t>(all_rows) * width, 0.0f);
}

ffi::Error LayersHandler(ffi::ThreadPool pool, Floats2 x, Scalar true_rows, Floats3 cos, Floats3 sin,
                         ffi::RemainingArgs rest, ffi::Result<Floats2> y, ffi::RemainingRets results, int64_t layers,
                         Integers heads, Integers steps, Integers outs, ffi::Span<const float> numbers) {
  const auto angles = cos.dimensions();
  const int64_t all = x.dimensions()[0], used = true_rows.typed_data()[0];
  const size_t caches = results.size();
  if (heads.size() != 3 || heads[0] < 1 || heads[1] < 1 || heads[2] < 0 || heads[0] % heads[1] != 0)
    return Bad("layers: expected heads to be N, K and H, N a multiple of K");
  if (used < 0 || used > all) return Bad("layers: " + std::to_string(used) + " true rows of x " + Shape(x.dimensions()));
  if (x.dimensions()[1] < 1 || !Same(x.dimensions(), y->dimensions()) || !Same(angles, sin.dimensions()) || angles[0] * angles[1] != all ||
      2 * angles[2] > heads[2])
    return Bad("layers: x " + Shape(x.dimensions()) + ", result " + Shape(y->dimensions()) + ", cos " + Shape(angles) +
               " and sin " + Shape(sin.dimensions()) + " do not fit together");
  if (caches != 2 && caches != 4) return Bad("layers: expected 2 caches, or 4 with scales, as results");
  AttentionOperands operands_of;
  Operands operands("layers", rest);
  for (size_t i = 0; i < caches; ++i) {
    auto result = results.get<ffi::AnyBuffer>(i);
    const auto operand = operands.Next("cache");
    if (!result.has_value() || !operand.has_value()) return Bad("layers: too few caches");
    operands_of.caches.push_back(*operand);
    operands_of.results.push_back(**result);
  }
  const auto cache = operands_of.caches[0].dimensions();
  if ((operands_of.caches[0].element_type() == ffi::S8) != (caches == 4))
    return Bad("layers: int8 caches come with key and value scales, others without");
  if (ffi::Error error = CheckCaches(operands_of); error.failure()) return error;
  if (cache[0] != layers || cache[2] != heads[1] || cache[4] != heads[2] ||
      !Same(cache, operands_of.caches[1].dimensions()))
    return Bad("layers: caches " + Shape(cache) + " and " + Shape(operands_of.caches[1].dimensions()) +
               " are not of " + std::to_string(layers) + " layers and these heads");
  const int32_t* rows[3];
  for (const int32_t*& of : rows) of = operands.Take<int32_t>("slots, starts or lengths", ffi::S32, {angles[0]});
  if (operands.error().failure()) return operands.error();
  // Attention reads what the products wrote, and they write no row of padding.
  for (int64_t r = 0; r < angles[0]; ++r)
    if (rows[2][r] > 0 && r * angles[1] + rows[2][r] > used)
      return Bad("layers: sequence " + std::to_string(r) + " of length " + std::to_string(rows[2][r]) +
                 " ends behind the " + std::to_string(used) + " true rows");
  const AttentionCall attention = {
      {angles[0], angles[1], heads[0], heads[1], heads[2], angles[2], cache[0], cache[1], cache[3]},
      nullptr, nullptr, nullptr, cos.typed_data(), sin.typed_data(), CacheOf(operands_of, 0), CacheOf(operands_of, 1),
      0, rows[0], rows[1], rows[2], nullptr, 0.0f, 0.0f, 0};
  Program program = Parser({layers, heads, steps, outs, numbers}, used, x.dimensions()[1], operands, attention).Parse();
  if (operands.error().failure()) return operands.error();
  Team team(pool);
  RunLayers(team, program, layers, all, x.typed_data(), y->typed_data());
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(PrecastLayersV1, LayersHandler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats2>()
                                  .Arg<Scalar>()
                                  .Arg<Floats3>()
                                  .Arg<Floats3>()
                                  .RemainingArgs()
                                  .Ret<Floats2>()
                                  .RemainingRets()
                                  .Attr<int64_t>("layers")
                                  .Attr<Integers>("heads")
                                  .Attr<Integers>("steps")
                                  .Attr<Integers>("outs")
                                  .Attr<ffi::Span<const float>>("numbers"));

}  // namespace precast
