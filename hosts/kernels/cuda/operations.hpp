// The operators that a session gets.
#pragma once

#include "ort.hpp"

namespace mirror_gpu {

const CustomOp& products_operation();
const CustomOp& gated_products_operation();
const CustomOp& half_products_operation();
const CustomOp& gated_half_products_operation();
const CustomOp& attention_operation();
const CustomOp& branch_mask_operation();
const CustomOp& stream_embedding_operation();

}  // namespace mirror_gpu
