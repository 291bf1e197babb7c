// Runs the steps of every layer, one after another, with one team.
#include "layers_call.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace precast {
namespace {

// Memory that serves one step after another.
struct Arenas {
  Arena linear, experts;
};

class Layer {
 public:
  Layer(Team& team, Arenas& arenas, const Program& p, size_t layer)
      : team_(team), arenas_(arenas), p_(p), at_(static_cast<int64_t>(layer)), place_(p.layers[layer]) {}

  void Run() {
    for (const Step& step : p_.steps) std::visit([&](const auto& call) { RunStep(step, call); }, step.call);
  }

 private:
  float* Result(const Step& step, size_t i) const { return p_.values[step.first_result + i].data; }
  const float* Input(const Step& step, size_t i) const {
    return step.inputs[i] < 0 ? nullptr : p_.values[static_cast<size_t>(step.inputs[i])].data;
  }
  template <typename T>
  const T* At(const T* first, const T* last) const {
    return Between(first, last, at_, static_cast<int64_t>(p_.layers.size()));
  }

  void RunStep(const Step& step, const LinearStep& of) {
    LinearCall c = of.first;
    c.x = Input(step, 0);
    c.residual = Input(step, 1);
    c.norm = At(of.first.norm, of.last.norm);
    for (size_t i = 0; i < c.parts.size(); ++i) {
      const LinearPart &first = of.first.parts[i], &last = of.last.parts[i];
      c.parts[i].weight = Between(first.weight, last.weight, at_, static_cast<int64_t>(p_.layers.size()));
      c.parts[i].bias = At(first.bias, last.bias);
      if (i < c.results()) c.parts[i].y = Result(step, i);
    }
    RunLinear(team_, arenas_.linear, c);
  }

  void RunStep(const Step& step, const AttentionStep& of) {
    AttentionCall c = AttentionWith(p_.attention, p_.groups[place_.group], of);
    const int64_t table = c.d.R * c.d.T * c.d.P;
    c.layer = place_.place;
    c.cos += place_.rope * table, c.sin += place_.rope * table;
    c.q = Input(step, 0), c.k = Input(step, 1), c.v = Input(step, 2), c.out = Result(step, 0);
    RunAttention(team_, c);
  }

  void RunStep(const Step& step, const NormStep& of) {
    NormCall c = of.first;
    c.x = Input(step, 0);
    c.residual = Input(step, 1);
    c.weight = At(of.first.weight, of.last.weight);
    c.bias = At(of.first.bias, of.last.bias);
    c.y = Result(step, 0);
    RunNorm(team_, c);
  }

  void RunStep(const Step& step, const ExpertsStep& of) {
    ExpertsCall c = of.first;
    c.x = Input(step, 0);
    c.scores = Input(step, 1);
    c.residual = Input(step, 2);
    c.first = at_ * c.experts;
    c.norm = At(of.first.norm, of.last_norm);
    c.y = Result(step, 0);
    RunExperts(team_, arenas_.linear, arenas_.experts, c);
  }

  Team& team_;
  Arenas& arenas_;
  const Program& p_;
  const int64_t at_;
  const LayerPlace place_;
};

}  // namespace

AttentionCall AttentionWith(const AttentionCall& base, const CacheGroup& group, const AttentionStep& step) {
  AttentionCall c = base;
  c.d.L = group.layers, c.d.B = group.slots, c.d.S = group.places;
  c.keys = group.keys, c.values = group.values;
  c.window = group.window;
  c.scale = step.scale, c.soft_cap = step.soft_cap;
  return c;
}

void RunLayers(Team& team, Program& p, int64_t all_rows, const float* x, float* y) {
  int64_t floats = 0;
  for (const Value& value : p.values) floats += RoundUp(all_rows * value.width, 16);
  Arena memory;
  Arenas arenas;
  memory.Reset(floats * 4);
  float* next = memory.Take<float>(floats);
  for (Value& value : p.values) {
    value.data = next;
    next += RoundUp(all_rows * value.width, 16);
  }
  const size_t width = static_cast<size_t>(p.values[0].width);
  std::memcpy(p.values[0].data, x, static_cast<size_t>(p.rows) * width * sizeof(float));
  for (size_t layer = 0; layer < p.layers.size(); ++layer) {
    Layer(team, arenas, p, layer).Run();
    std::swap(p.values.front().data, p.values.back().data);  // what one layer gives, the next is given
  }
  // Padding is zero, so that nothing downstream reads what was never written.
  std::memcpy(y, p.values[0].data, static_cast<size_t>(p.rows) * width * sizeof(float));
  std::fill(y + static_cast<size_t>(p.rows) * width, y + static_cast<size_t>(all_rows) * width, 0.0f);
}

}  // namespace precast
