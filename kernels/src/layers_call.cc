// The steps of every layer, run in order by one team of threads.
#include "layers_call.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace precast {
namespace {

// Memory that each step reuses.
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

  void RunStep(const Step& step, const LinearStep& linear) {
    LinearCall c = {.rows = p_.rows,
                    .in = linear.in,
                    .x = Input(step, 0),
                    .norm = linear.norm.At(at_),
                    .eps = linear.eps,
                    .residual = Input(step, 1),
                    .gate = linear.gate};
    c.parts.reserve(linear.parts.size());
    for (const LinearStepPart& part : linear.parts)
      c.parts.push_back({.weight = part.weights.At(at_), .bias = part.bias.At(at_)});
    for (size_t i = 0; i < c.results(); ++i) c.parts[i].y = Result(step, i);
    RunLinear(team_, arenas_.linear, c);
  }

  void RunStep(const Step& step, const AttentionStep& attention) {
    AttentionCall c = AttentionWith(p_.attention, p_.groups[place_.group], attention);
    const int64_t table = c.d.R * c.d.T * c.d.P;
    c.layer = place_.place;
    c.cos += place_.rope * table;
    c.sin += place_.rope * table;
    c.q = Input(step, 0);
    c.k = Input(step, 1);
    c.v = Input(step, 2);
    c.out = Result(step, 0);
    RunAttention(team_, c);
  }

  void RunStep(const Step& step, const NormStep& norm) {
    RunNorm(team_, {.rows = p_.rows,
                    .width = norm.width,
                    .piece = norm.piece,
                    .x = Input(step, 0),
                    .weight = norm.weight.At(at_),
                    .bias = norm.bias.At(at_),
                    .residual = Input(step, 1),
                    .eps = norm.eps,
                    .y = Result(step, 0)});
  }

  void RunStep(const Step& step, const ExpertsStep& experts) {
    RunExperts(team_, arenas_.linear, arenas_.experts,
               {.rows = p_.rows,
                .width = experts.width,
                .ff = experts.ff,
                .experts = experts.experts,
                .chosen = experts.chosen,
                .first = at_ * experts.experts,
                .x = Input(step, 0),
                .scores = Input(step, 1),
                .norm = experts.norm.At(at_),
                .residual = Input(step, 2),
                .eps = experts.eps,
                .renormalised = experts.renormalised,
                .gate = experts.gate,
                .gates = experts.gates,
                .ups = experts.ups,
                .downs = experts.downs,
                .y = Result(step, 0)});
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
  c.d.L = group.layers;
  c.d.B = group.slots;
  c.d.S = group.places;
  c.keys = group.keys;
  c.values = group.values;
  c.window = group.window;
  c.scale = step.scale;
  c.soft_cap = step.soft_cap;
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
    std::swap(p.values.front().data, p.values.back().data);  // the result of one layer is the input of the next
  }
  // Padding becomes zero, so that later operations never read uninitialised memory.
  std::memcpy(y, p.values[0].data, static_cast<size_t>(p.rows) * width * sizeof(float));
  std::fill(y + static_cast<size_t>(p.rows) * width, y + static_cast<size_t>(all_rows) * width, 0.0f);
}

}  // namespace precast
