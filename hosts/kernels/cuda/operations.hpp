// The operators that a session gets.
#pragma once

#include <vector>

#include "ort.hpp"

namespace mirror_gpu {

// In place of built-in ones.
const CustomOp& products_operation();
const CustomOp& attention_operation();
// In place of functions that a bundle's graphs declare.
std::vector<const CustomOp*> named_products();
const CustomOp& branch_mask_operation();
const CustomOp& stream_embedding_operation();

}  // namespace mirror_gpu
