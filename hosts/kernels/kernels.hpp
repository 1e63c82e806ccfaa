// A pass for each instruction set, and which of them this CPU has.
#pragma once

#include "draft.hpp"

namespace mirror_kernels {

RunPass avx2_pass();
RunPass avx512_pass();
RunPass amx_pass();

// Whether the CPU and the system have the matrix units, and let this process use them.
bool use_matrix_units();

}  // namespace mirror_kernels
