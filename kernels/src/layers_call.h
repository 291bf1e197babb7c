// A checked call of all layers of a decoder. All layers have the same steps, and their operands are stacked.
#pragma once

#include <cstdint>
#include <variant>
#include <vector>

#include "attention_call.h"
#include "experts_call.h"
#include "linear_call.h"
#include "norm_call.h"
#include "stack.h"

namespace precast {

// A layer's input or the result of a step: [M, width].
struct Value {
  int64_t width;
  float* data = nullptr;
};

struct LinearStepPart {
  WeightStack weights;
  Stack<float> bias = {};  // [L, outs]
};
struct LinearStep {
  int64_t in;
  float eps;
  Gate gate;
  Stack<float> norm = {};  // [L, in]
  std::vector<LinearStepPart> parts = {};
};

struct NormStep {
  int64_t width, piece;
  float eps;
  Stack<float> weight = {}, bias = {};  // [L, piece]
};

struct ExpertsStep {
  int64_t width, ff, experts, chosen;
  float eps;
  bool renormalised;
  Gate gate;
  Stack<float> norm = {};                        // [L, width]
  WeightStack gates = {}, ups = {}, downs = {};  // an entry for each expert of each layer
};

// A step of attention; the layer determines its cache, window and rotary table.
struct AttentionStep {
  float scale, soft_cap;
};

struct Step {
  std::vector<int64_t> inputs;  // indices of values; the residual is last, -1 for none
  size_t first_result;
  std::variant<LinearStep, AttentionStep, NormStep, ExpertsStep> call;
};

// The cache of all layers with the same window.
struct CacheGroup {
  int64_t window;
  int64_t layers = 0, slots = 0, places = 0;
  CacheRows keys = {}, values = {};
};

// The cache and the rotary table of a layer.
struct LayerPlace {
  size_t group;
  int64_t place;  // index among the layers of the group
  int64_t rope;
};

// A whole call, parsed and checked.
struct Program {
  int64_t rows;
  std::vector<Value> values;
  std::vector<Step> steps = {};
  AttentionCall attention = {};  // with the first rotary table and without a cache
  std::vector<CacheGroup> groups = {};
  std::vector<LayerPlace> layers;
};

// Return a call of attention on the cache of a group, without its layer, queries, keys, values and output.
AttentionCall AttentionWith(const AttentionCall& base, const CacheGroup& group, const AttentionStep& step);

// Run x [all_rows, width] through all layers. The rows after the first `p.rows` are padding, and become zero in y.
void RunLayers(Team& team, Program& p, int64_t all_rows, const float* x, float* y);

}  // namespace precast
