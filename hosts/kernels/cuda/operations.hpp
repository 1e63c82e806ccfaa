// The operators that a session gets.
#pragma once

#include "ort.hpp"

namespace mirror_gpu {

const CustomOp& products_operation();
const CustomOp& gated_products_operation();
const CustomOp& gated_half_products_operation();
const CustomOp& attention_operation();

}  // namespace mirror_gpu
