// The gated delta rule between its projections, for the op of that name and the block round it.
#pragma once
#include "../core/contract.h"
#include "kernels.h"

namespace hm {

// hk, hv, dk, dv and eps to the task; binds c h k v m w and returns with batch and tokens unknown.
void check_gated_delta_sizes(Contract& c, const int64_t* heads, double eps, GatedDeltaTask& task);
// conv_weight, a_log, dt_bias, norm.
void check_gated_delta_vectors(Contract& c, const DLTensor* vectors, GatedDeltaTask& task);
// conv_state and state, both read and replaced.
void check_gated_delta_states(Contract& c, const DLTensor* states, GatedDeltaTask& task);
// All of the task's tokens; task.proj and task.y are set.
void run_gated_delta(GatedDeltaTask task);

}  // namespace hm
