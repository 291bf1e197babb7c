// All layers of a decoder with everything checked: the steps of a layer, and what each layer's are made with.
#pragma once

#include <cstdint>
#include <variant>
#include <vector>

#include "attention_call.h"
#include "experts_call.h"
#include "linear_call.h"
#include "norm_call.h"

namespace precast {

// What a layer is given, or a step's result: [M, width].
struct Value {
  int64_t width;
  float* data;
};

// A step's operands lie evenly from the first layer's to the last's.
struct LinearStep {
  LinearCall first, last;
};
struct NormStep {
  NormCall first, last;
};
struct ExpertsStep {
  ExpertsCall first;
  const float* last_norm;
};
// Cache, window and rotary table are the layer's.
struct AttentionStep {
  float scale, soft_cap;
};

struct Step {
  std::vector<int64_t> inputs;  // values; -1 for a residual that there is none of, which comes last
  size_t first_result;
  std::variant<LinearStep, AttentionStep, NormStep, ExpertsStep> call;
};

// The cache of the layers that see equally far.
struct CacheGroup {
  int64_t window, layers, slots, places;
  CacheRows keys, values;
};

// Which cache is a layer's, which of the cache's layers it is, and which rotary table it takes.
struct LayerPlace {
  size_t group;
  int64_t place, rope;
};

// Everything a call is made of; nothing in it has been run.
struct Program {
  int64_t rows;
  std::vector<Value> values;
  std::vector<Step> steps;
  AttentionCall attention;  // of the first rotary table, without a cache
  std::vector<CacheGroup> groups;
  std::vector<LayerPlace> layers;
};

// A call of attention with one of the caches, of no layer and without queries, keys and values.
AttentionCall AttentionWith(const AttentionCall& base, const CacheGroup& group, const AttentionStep& step);

// Takes x [all_rows, width], of which `p.rows` are no padding, through all layers; rows of padding become zero.
void RunLayers(Team& team, Program& p, int64_t all_rows, const float* x, float* y);

}  // namespace precast
