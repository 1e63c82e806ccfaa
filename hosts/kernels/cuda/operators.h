/* Two of ONNX Runtime's operators, done otherwise on NVIDIA GPUs, for passes of a few rows in float16, and gated products.
 *
 * A session that they are registered with computes on a GPU, by kernels of our own,
 * - MatMulNBits where a pass has 2 to 16 rows and the matrix is of a bundle's kind (4 or 8 bits, blocks of 32, float16
 *   scales, no zero points),
 * - GroupQueryAttention where it has up to 16 rows, or up to 1,024 with a mask, over a cache in place, with heads of a
 *   multiple of 64 channels, up to 256.
 * All else is left to ONNX Runtime's. Of domain mirror, which a bundle's graphs declare as functions, it computes
 * GatedMatMulNBits and GatedFusedMatMul: silu(gate) * up of a product's halves, in the product's kernel where that is ours,
 * else behind ONNX Runtime's. The kernels are compiled for the GPU at hand by NVRTC, 0.1 to 0.4 s for each size of
 * matrix or head.
 */
#ifndef MIRROR_KERNELS_CUDA_OPERATORS_H
#define MIRROR_KERNELS_CUDA_OPERATORS_H

#include "../draft_pass.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Why this process can't have them, in words; null if it can. The CUDA driver and NVRTC are looked for by name, so
 * whoever keeps them elsewhere loads them first. */
MIRROR_KERNELS_API const char* mirror_operators_missing(void);

/* Adds them to a session's options (OrtSessionOptions*, const OrtApiBase*). Returns an OrtStatus*, null if all is
 * well. */
MIRROR_KERNELS_API void* mirror_operators_register(void* options, const void* api_base);

#if !defined(MIRROR_KERNELS_STATIC)
/* The same, by the name that ONNX Runtime looks for in a library of operators. */
MIRROR_KERNELS_API void* RegisterCustomOps(void* options, const void* api_base);
#endif

#ifdef __cplusplus
}
#endif

#endif
