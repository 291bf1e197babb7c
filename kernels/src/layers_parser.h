// A parser that reads the steps of a layer from attributes and operands and checks each against the steps before it.
#pragma once

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "layers_call.h"
#include "operands.h"
#include "step_codes.h"

namespace precast {

using Integers = ffi::Span<const int64_t>;

// The attributes that encode the steps (step_codes.h). The operands follow the order of the steps; in each step the
// norm comes first, then every weight with its bias.
struct StepCodes {
  Integers steps, outs;
  ffi::Span<const float> numbers;
};

class Parser {
 public:
  // In `program`, the rows, the value of the layer's input, attention, groups and layers are already set.
  Parser(const StepCodes& codes, Operands& operands, Program& program)
      : codes_(codes), operands_(operands), program_(program) {}

  // Add the steps and their results to the program.
  void Parse() {
    const size_t count = codes_.steps.size() / kStepIntegers;
    if (codes_.steps.size() % kStepIntegers != 0 || count == 0 || codes_.numbers.size() != kStepNumbers * count)
      Fail("expected steps of eight integers and two numbers each");
    for (size_t i = 0; i < count && !failed(); ++i)
      ParseStep(codes_.steps.begin() + i * kStepIntegers, codes_.numbers.begin() + i * kStepNumbers);
    if (!operands_.AtEnd()) Fail("more operands than the steps take");
    if (next_out_ != codes_.outs.size()) Fail("more widths than the steps have weights");
    if (!failed() && program_.values.back().width != program_.values[0].width)
      Fail("expected a last step whose result is as wide as the layer's input");
  }

 private:
  void ParseStep(const int64_t* integers, const float* numbers) {
    switch (static_cast<StepKind>(integers[0])) {
      case StepKind::kLinear: return Linear(ReadCode<LinearCode>(integers), numbers[0]);
      case StepKind::kAttention:
        return Attention(ReadCode<AttentionCode>(integers), {.scale = numbers[0], .soft_cap = numbers[1]});
      case StepKind::kNorm: return Norm(ReadCode<NormCode>(integers), numbers[0]);
      case StepKind::kExperts: return Experts(ReadCode<ExpertsCode>(integers), numbers[0], numbers[1]);
    }
    Fail("step of unknown kind " + std::to_string(integers[0]));
  }

  bool failed() const { return operands_.error().failure(); }
  void Fail(const std::string& what) { operands_.Fail(what); }

  bool Known(int64_t value) {
    if (value >= 0 && value < static_cast<int64_t>(program_.values.size())) return true;
    Fail("no earlier step computes value " + std::to_string(value));
    return false;
  }
  bool KnownOrNone(int64_t value) { return value == -1 || Known(value); }
  bool FitsOrNone(int64_t residual, int64_t width) const { return residual == -1 || Width(residual) == width; }
  int64_t Width(int64_t value) const { return program_.values[static_cast<size_t>(value)].width; }
  // The index of the last entry in a stack that has an entry for each layer.
  int64_t last_layer() const { return static_cast<int64_t>(program_.layers.size()) - 1; }

  template <typename Call>
  void Add(std::vector<int64_t> inputs, Call call, const std::vector<int64_t>& widths) {
    program_.steps.push_back(
        {.inputs = std::move(inputs), .first_result = program_.values.size(), .call = std::move(call)});
    for (int64_t width : widths) program_.values.push_back({.width = width});
  }

  // Return true if a linear step can have this gate, this residual and this number of weights.
  bool IsLinear(const LinearCode& code) const {
    const bool gated = code.gate != static_cast<int64_t>(Gate::kNone);
    return code.gate >= 0 && code.gate <= static_cast<int64_t>(Gate::kGeluTanh) && code.weights >= 1 &&
           code.weights <= 64 && next_out_ + static_cast<size_t>(code.weights) <= codes_.outs.size() &&
           (!gated || code.weights <= 2) && (code.residual == -1 || gated || code.weights == 1);
  }

  void Linear(const LinearCode& code, float eps) {
    if (!Known(code.x) || !KnownOrNone(code.residual)) return;
    if (!IsLinear(code))
      return Fail("cannot run a linear step with gate " + std::to_string(code.gate) + " and " +
                  std::to_string(code.weights) + " weights");
    const int64_t* first = codes_.outs.begin() + next_out_;
    const std::vector<int64_t> outs(first, first + code.weights);
    next_out_ += outs.size();
    LinearStep step = {.in = Width(code.x), .eps = eps, .gate = static_cast<Gate>(code.gate)};
    const bool gated = step.gate != Gate::kNone;
    if ((gated && outs.front() != outs.back()) || *std::min_element(outs.begin(), outs.end()) < 1 ||
        !FitsOrNone(code.residual, outs[0]))
      return Fail("the widths of a linear step do not fit together");
    if (code.has_norm != 0) step.norm = operands_.TakeStack<float>("norm", last_layer(), ffi::F32, {step.in});
    for (int64_t out : outs) {
      LinearStepPart part = {.weights = TakeWeights(operands_, last_layer(), out, step.in)};
      if (code.has_bias != 0) part.bias = operands_.TakeStack<float>("bias", last_layer(), ffi::F32, {out});
      step.parts.push_back(part);
    }
    Add({code.x, code.residual}, std::move(step), gated ? std::vector<int64_t>{outs[0]} : outs);
  }

  void Attention(const AttentionCode& code, const AttentionStep& step) {
    const AttentionShape& d = program_.attention.d;
    // Divide instead of multiplying: the numbers of heads are unchecked attributes, and a product could overflow.
    const auto has_heads = [&](int64_t value, int64_t heads) {
      return Width(value) % d.H == 0 && Width(value) / d.H == heads;
    };
    if (!Known(code.q) || !Known(code.k) || !Known(code.v)) return;
    if (!has_heads(code.q, d.N) || !has_heads(code.k, d.K) || !has_heads(code.v, d.K))
      return Fail("attention: expected q as wide as N heads, and k and v as wide as K heads");
    for (const CacheGroup& group : program_.groups)
      if (const std::string error = CheckAttention(AttentionWith(program_.attention, group, step)); !error.empty())
        return Fail(error);
    Add({code.q, code.k, code.v}, step, {d.N * d.H});
  }

  void Norm(const NormCode& code, float eps) {
    if (!Known(code.x) || !KnownOrNone(code.residual)) return;
    NormStep step = {.width = Width(code.x), .piece = code.width, .eps = eps};
    if (step.piece < 1 || step.width % step.piece != 0 || !FitsOrNone(code.residual, step.width))
      return Fail("the widths of a norm of " + std::to_string(step.piece) + " numbers do not fit together");
    step.weight = operands_.TakeStack<float>("norm", last_layer(), ffi::F32, {step.piece});
    if (code.has_bias != 0)
      step.bias = operands_.TakeStack<float>("bias of a norm", last_layer(), ffi::F32, {step.piece});
    Add({code.x, code.residual}, step, {step.width});
  }

  // Return true if an experts step can have this gate and these numbers of experts, and `outs` has a width left for it.
  bool IsExperts(const ExpertsCode& code, float renormalised) const {
    return code.gate > static_cast<int64_t>(Gate::kNone) && code.gate <= static_cast<int64_t>(Gate::kGeluTanh) &&
           code.experts >= 1 && code.chosen >= 1 && code.chosen <= code.experts && next_out_ < codes_.outs.size() &&
           (renormalised == 0.0f || renormalised == 1.0f);
  }

  void Experts(const ExpertsCode& code, float eps, float renormalised) {
    if (!Known(code.x) || !Known(code.scores) || !KnownOrNone(code.residual)) return;
    if (!IsExperts(code, renormalised))
      return Fail("cannot run an experts step with gate " + std::to_string(code.gate) + " and " +
                  std::to_string(code.chosen) + " of " + std::to_string(code.experts) + " experts");
    ExpertsStep step = {.width = Width(code.x),
                        .ff = codes_.outs[next_out_++],
                        .experts = code.experts,
                        .chosen = code.chosen,
                        .eps = eps,
                        .renormalised = renormalised != 0.0f,
                        .gate = static_cast<Gate>(code.gate)};
    if (step.ff < 1 || Width(code.scores) != step.experts || !FitsOrNone(code.residual, step.width))
      return Fail("the widths of an experts step do not fit together");
    if (code.has_norm != 0) step.norm = operands_.TakeStack<float>("norm", last_layer(), ffi::F32, {step.width});
    const int64_t last = static_cast<int64_t>(program_.layers.size()) * step.experts - 1;
    step.gates = TakeWeights(operands_, last, step.ff, step.width);
    step.ups = TakeWeights(operands_, last, step.ff, step.width);
    step.downs = TakeWeights(operands_, last, step.width, step.ff);
    Add({code.x, code.scores, code.residual}, step, {step.width});
  }

  const StepCodes codes_;
  Operands& operands_;
  Program& program_;
  size_t next_out_ = 0;
};

}  // namespace precast
