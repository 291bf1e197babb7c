// Reads the steps of a layer from attributes and operands, checking that each fits what comes before it.
#pragma once

#include <algorithm>
#include <string>
#include <utility>

#include "layers_call.h"
#include "operands.h"

namespace precast {

using Integers = ffi::Span<const int64_t>;

// How the attribute `steps` spells a step: eight integers. A value is a number: 0 is what a layer is given, and every
// step adds its results. Two floats of `numbers` belong to each.
//   linear:    kLinear, x, residual or -1, norm, bias, gate, weights, 0; takes `weights` widths from `outs`; eps, 0
//   attention: kAttention, q, k, v, 0, 0, 0, 0; scale, soft_cap
//   norm:      kNorm, x, residual or -1, width of a piece, bias, 0, 0, 0; eps, 0
//   experts:   kExperts, x, scores, residual or -1, norm, gate, experts, chosen; takes a width from `outs`; eps,
//              whether shares are renormalised
// Of its operands a norm comes first, then weight by weight, each with its bias behind it.
constexpr int64_t kStepLength = 8;
enum Kind : int64_t { kLinear = 0, kAttention = 1, kNorm = 2, kExperts = 3 };

struct StepCodes {
  Integers steps, outs;
  ffi::Span<const float> numbers;
};

class Parser {
 public:
  // `program` has its rows, what a layer is given, attention, groups and layers.
  Parser(const StepCodes& codes, Operands& operands, Program& program)
      : codes_(codes), operands_(operands), program_(program) {}

  // Adds the steps and their results.
  void Parse() {
    const size_t count = codes_.steps.size() / kStepLength;
    if (codes_.steps.size() % kStepLength != 0 || count == 0 || codes_.numbers.size() != 2 * count)
      Fail("expected steps of eight integers and two numbers each");
    for (size_t i = 0; i < count && !failed(); ++i)
      ParseStep(codes_.steps.begin() + i * kStepLength, codes_.numbers.begin() + 2 * i);
    if (!operands_.AtEnd()) Fail("more operands than the steps take");
    if (next_out_ != codes_.outs.size()) Fail("more widths than the steps have weights");
    if (!failed() && program_.values.back().width != program_.values[0].width)
      Fail("the last step's result is not as wide as what a layer is given");
  }

 private:
  void ParseStep(const int64_t* code, const float* numbers) {
    switch (code[0]) {
      case kLinear: return Linear(code, numbers[0]);
      case kAttention: return Attention(code, {numbers[0], numbers[1]});
      case kNorm: return Norm(code, numbers[0]);
      case kExperts: return Experts(code, numbers[0], numbers[1]);
      default: return Fail("step of unknown kind " + std::to_string(code[0]));
    }
  }

  bool failed() const { return operands_.error().failure(); }
  void Fail(const std::string& what) { operands_.Fail(what); }

  bool Known(int64_t value) {
    if (value >= 0 && value < static_cast<int64_t>(program_.values.size())) return true;
    Fail("value " + std::to_string(value) + " is not known yet");
    return false;
  }
  bool KnownOrNone(int64_t value) { return value == -1 || Known(value); }
  int64_t Width(int64_t value) const { return program_.values[static_cast<size_t>(value)].width; }
  int64_t layers() const { return static_cast<int64_t>(program_.layers.size()); }

  template <typename Call>
  void Add(std::vector<int64_t> inputs, Call call, std::initializer_list<int64_t> widths) {
    program_.steps.push_back({std::move(inputs), program_.values.size(), std::move(call)});
    for (int64_t width : widths) program_.values.push_back({width, nullptr});
  }

  // Calls `take` with the first and the last entry of stacks of `count`; both read the same operands.
  template <typename Take>
  void TakeEnds(int64_t count, const Take& take) {
    const size_t place = operands_.place();
    take(count - 1, true);
    operands_.Seek(place);
    take(0, false);
  }

  void Linear(const int64_t* code, float eps) {
    const int64_t x = code[1], residual = code[2], gate = code[5], weights = code[6];
    if (!Known(x) || !KnownOrNone(residual)) return;
    const bool gated = gate != static_cast<int64_t>(Gate::kNone);
    if (gate < 0 || gate > static_cast<int64_t>(Gate::kGeluTanh) || weights < 1 || weights > 64 ||
        next_out_ + static_cast<size_t>(weights) > codes_.outs.size() || (gated && weights > 2) ||
        (residual != -1 && !gated && weights != 1))
      return Fail("a linear step with gate " + std::to_string(gate) + " and " + std::to_string(weights) + " weights");
    const int64_t in = Width(x);
    const int64_t* outs = codes_.outs.begin() + next_out_;
    next_out_ += static_cast<size_t>(weights);
    if ((gated && outs[0] != outs[weights - 1]) || *std::min_element(outs, outs + weights) < 1 ||
        (residual != -1 && Width(residual) != outs[0]))
      return Fail("a linear step whose widths do not fit together");
    LinearStep step;
    step.first = {program_.rows, in, nullptr, nullptr, eps, nullptr, static_cast<Gate>(gate), {}};
    step.last = step.first;
    TakeEnds(layers(), [&](int64_t layer, bool last) { TakeLinear(code, outs, layer, last ? step.last : step.first); });
    Add({x, residual}, std::move(step), {});
    for (int64_t i = 0; i < (gated ? 1 : weights); ++i) program_.values.push_back({outs[i], nullptr});
  }

  void TakeLinear(const int64_t* code, const int64_t* outs, int64_t layer, LinearCall& c) {
    if (code[3] != 0) c.norm = operands_.TakeLayer<float>("norm", layer, ffi::F32, {c.in});
    for (int64_t i = 0; i < code[6]; ++i) {
      const Weight weight = TakeWeight(operands_, layer, outs[i], c.in);
      const float* bias = code[4] == 0 ? nullptr : operands_.TakeLayer<float>("bias", layer, ffi::F32, {outs[i]});
      c.parts.push_back({weight, bias, nullptr});
    }
  }

  void Attention(const int64_t* code, const AttentionStep& step) {
    const AttentionShape& d = program_.attention.d;
    for (int i = 1; i <= 3; ++i) {
      if (!Known(code[i])) return;
      // Divided, not multiplied: a number of heads out of an attribute may be anything.
      if (Width(code[i]) % d.H != 0 || Width(code[i]) / d.H != (i == 1 ? d.N : d.K)) return Fail("attention of values that are not heads wide");
    }
    for (const CacheGroup& group : program_.groups)
      if (const std::string wrong = CheckAttention(AttentionWith(program_.attention, group, step)); !wrong.empty())
        return Fail(wrong);
    Add({code[1], code[2], code[3]}, step, {d.N * d.H});
  }

  void Norm(const int64_t* code, float eps) {
    const int64_t x = code[1], residual = code[2], piece = code[3];
    if (!Known(x) || !KnownOrNone(residual)) return;
    const int64_t width = Width(x);
    if (piece < 1 || width % piece != 0 || (residual != -1 && Width(residual) != width))
      return Fail("a norm of pieces of " + std::to_string(piece) + " numbers, whose widths do not fit together");
    NormStep step;
    step.first = {program_.rows, width, piece, nullptr, nullptr, nullptr, nullptr, eps, nullptr};
    step.last = step.first;
    TakeEnds(layers(), [&](int64_t layer, bool last) {
      NormCall& c = last ? step.last : step.first;
      c.weight = operands_.TakeLayer<float>("norm", layer, ffi::F32, {piece});
      if (code[4] != 0) c.bias = operands_.TakeLayer<float>("bias of a norm", layer, ffi::F32, {piece});
    });
    Add({x, residual}, step, {width});
  }

  void Experts(const int64_t* code, float eps, float renormalised) {
    const int64_t x = code[1], scores = code[2], residual = code[3];
    const int64_t gate = code[5], experts = code[6], chosen = code[7];
    if (!Known(x) || !Known(scores) || !KnownOrNone(residual)) return;
    if (gate <= static_cast<int64_t>(Gate::kNone) || gate > static_cast<int64_t>(Gate::kGeluTanh) || experts < 1 ||
        chosen < 1 || chosen > experts || next_out_ == codes_.outs.size() ||
        !(renormalised == 0.0f || renormalised == 1.0f))
      return Fail("an experts step with gate " + std::to_string(gate) + " and " + std::to_string(chosen) + " of " +
                  std::to_string(experts) + " experts");
    const int64_t width = Width(x), ff = codes_.outs[next_out_++];
    if (ff < 1 || Width(scores) != experts || (residual != -1 && Width(residual) != width))
      return Fail("an experts step whose widths do not fit together");
    ExpertsStep step = {{program_.rows, width, ff, experts, chosen, 0, nullptr, nullptr, nullptr, nullptr, eps,
                         renormalised != 0.0f, static_cast<Gate>(gate), {}, {}, {}, nullptr},
                        nullptr};
    if (code[4] != 0)
      TakeEnds(layers(), [&](int64_t layer, bool last) {
        (last ? step.last_norm : step.first.norm) = operands_.TakeLayer<float>("norm", layer, ffi::F32, {width});
      });
    step.first.gates = TakeExperts(experts, ff, width);
    step.first.ups = TakeExperts(experts, ff, width);
    step.first.downs = TakeExperts(experts, width, ff);
    Add({x, scores, residual}, step, {width});
  }

  ExpertWeights TakeExperts(int64_t experts, int64_t outs, int64_t in) {
    ExpertWeights weights = {{}, {}, layers() * experts};
    TakeEnds(weights.count, [&](int64_t i, bool last) {
      (last ? weights.last : weights.first) = TakeWeight(operands_, i, outs, in);
    });
    return weights;
  }

  const StepCodes codes_;
  Operands& operands_;
  Program& program_;
  size_t next_out_ = 0;
};

}  // namespace precast
