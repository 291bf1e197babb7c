// A checked call of a mixture of experts: every row goes through the gated MLPs with the highest scores.
#pragma once

#include <cstdint>

#include "linear_call.h"
#include "stack.h"

namespace precast {

// y = residual + the sum over a row's chosen experts of share * down(gate(x g^T) * (x u^T)), with x normalised first.
// The shares are the softmax of the row's scores; `renormalised` scales those of the chosen experts to sum to 1.
struct ExpertsCall {
  int64_t rows, width, ff;  // M, D, F
  int64_t experts, chosen;  // experts of a layer; experts of a row
  int64_t first;            // index of the layer's first expert in the stacks
  const float* x;           // [M, D]
  const float* scores;      // [M, experts]
  const float* norm;        // [D], or null
  const float* residual;    // [M, D], or null
  float eps;
  bool renormalised;
  Gate gate;
  WeightStack gates, ups, downs;  // [F, D], [F, D], [D, F] of each expert
  float* y;                       // [M, D]
};

// Run the call; read only experts that some row chose. The products use the memory of `linear`; the mixture uses `own`.
void RunExperts(Team& team, Arena& linear, Arena& own, const ExpertsCall& call);

}  // namespace precast
