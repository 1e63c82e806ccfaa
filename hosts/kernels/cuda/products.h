/* Products of a few rows with block-quantised matrices on NVIDIA GPUs: ONNX Runtime's MatMulNBits, done otherwise.
 *
 * A session that these are registered with computes its MatMulNBits nodes on a GPU by kernels of our own where a pass
 * has 2 to 16 rows, and by ONNX Runtime's where it has one or more than these, or the matrix is of another kind than a
 * bundle's (float16 rows and scales, 4 or 8 bits, blocks of 32, no zero points). The kernels are compiled for the GPU at
 * hand by NVRTC, 0.1 s for each size of matrix.
 */
#ifndef MIRROR_KERNELS_CUDA_PRODUCTS_H
#define MIRROR_KERNELS_CUDA_PRODUCTS_H

#include "../draft_pass.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Why this process can't have them, in words; null if it can. The CUDA driver and NVRTC are looked for by name, so
 * whoever keeps them elsewhere loads them first. */
MIRROR_KERNELS_API const char* mirror_products_missing(void);

/* Adds them to a session's options (OrtSessionOptions*, const OrtApiBase*). Returns an OrtStatus*, null if all is
 * well. */
MIRROR_KERNELS_API void* mirror_products_register(void* options, const void* api_base);

#if !defined(MIRROR_KERNELS_STATIC)
/* The same, by the name that ONNX Runtime looks for in a library of operators. */
MIRROR_KERNELS_API void* RegisterCustomOps(void* options, const void* api_base);
#endif

#ifdef __cplusplus
}
#endif

#endif
