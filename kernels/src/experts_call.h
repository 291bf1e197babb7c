// A mixture of experts with everything checked: every row goes through the gated MLPs that its scores are highest for.
#pragma once

#include <cstdint>

#include "linear_call.h"
#include "stack.h"

namespace precast {

// Weights of every layer's experts, layer after layer.
struct ExpertWeights {
  Weight first, last;
  int64_t count;

  Weight At(int64_t i) const { return Between(first, last, i, count); }
};

// y = residual + sum over a row's chosen experts of share * down(gate(x g^T) * (x u^T)), of x normed. The shares are
// the softmax of the row's scores; renormalised, those of the chosen add up to one.
struct ExpertsCall {
  int64_t rows, width, ff;        // M, D, F
  int64_t experts, chosen, first; // of a layer; of a row; place of the layer's first in the stacks
  const float *x, *scores;        // [M, D], [M, experts]
  const float* norm;              // [D], or null
  const float* residual;          // [M, D], or null
  float eps;
  bool renormalised;
  Gate gate;
  ExpertWeights gates, ups, downs;  // [F, D], [F, D], [D, F]
  float* y;                         // [M, D]
};

// Experts that no row chose are not read. `linear` and `own` are memory for the products and for what lies between.
void RunExperts(Team& team, Arena& linear, Arena& own, const ExpertsCall& call);

}  // namespace precast
