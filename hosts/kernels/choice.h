/* The target's token, drawn from one row of logits as docs/sampling.md says, in a plain C interface.
 *
 * Most of a row can't matter to a draw: that part is bounded in float32 and left alone, the rest is float64. The token
 * is the one that the page gives worked through over the whole row.
 */
#ifndef MIRROR_KERNELS_CHOICE_H
#define MIRROR_KERNELS_CHOICE_H

#include "draft_pass.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  double temperature; /* above 0 */
  double top_p;       /* 1 keeps all */
  double min_p;       /* 0 keeps all */
  int64_t top_k;      /* 0 keeps all */
  uint64_t seed;
} mirror_law;

/* The token for an absolute position, from its logits [count], penalties applied; -1 if the greatest is no finite
 * number. */
MIRROR_KERNELS_API int64_t mirror_choose(const float* logits, int32_t count, const mirror_law* law, int64_t position);

#ifdef __cplusplus
}
#endif

#endif
