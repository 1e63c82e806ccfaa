/* A draft's pass in 8-bit integers on x86-64, in a plain C interface.
 *
 * A draft that is a Llama-like decoder (RMS norms before attention and MLP, rotary heads, gated MLP) runs here as one
 * call: a team of threads goes through the layers together, and what ONNX Runtime does in some 25 operators a layer are
 * nine steps with a barrier each. Rows may belong to the trunk or to branches; see docs/bundle.md for the tree layout.
 *
 * Nothing here knows ONNX, Python or files: a caller hands over arrays, which are packed and may then be freed.
 */
#ifndef MIRROR_KERNELS_DRAFT_PASS_H
#define MIRROR_KERNELS_DRAFT_PASS_H

#include <stdint.h>

/* MIRROR_KERNELS_STATIC: part of another library, which doesn't show it. */
#if defined(MIRROR_KERNELS_STATIC)
#define MIRROR_KERNELS_API
#elif defined(_WIN32)
#define MIRROR_KERNELS_API __declspec(dllexport)
#else
#define MIRROR_KERNELS_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define MIRROR_KERNELS_VERSION 2

/* A linear layer: int8 values [in, out], float32 scales [out], float32 bias [out] or null. */
typedef struct {
  const int8_t* values;
  const float* scales;
  const float* bias;
  int32_t in, out;
} mirror_matrix;

/* q, k and v are one matrix, gate and up another, in that order. Norms are float32; those of heads may be null. */
typedef struct {
  const float* attention_norm; /* [hidden] */
  const float* query_norm;     /* [head_dim] or null */
  const float* key_norm;       /* [head_dim] or null */
  const float* mlp_norm;       /* [hidden] */
  mirror_matrix qkv, output, gate_up, down;
} mirror_layer;

/* How an embedding's rows are stored. Blocks are 32 values along a row with a float scale; 4-bit values lie low
 * nibble first, and 8 (4 bits) or 128 (8 bits) means zero. */
enum { MIRROR_FLOAT32 = 0, MIRROR_FLOAT16 = 1, MIRROR_BFLOAT16 = 2, MIRROR_BLOCKS_4 = 3, MIRROR_BLOCKS_8 = 4 };

typedef struct {
  const void* values;
  const void* scales; /* of blocks, in `scale_kind`; else null */
  int32_t kind, scale_kind;
} mirror_embedding;

typedef struct {
  int32_t hidden, heads, kv_heads, head_dim, inner, layer_count;
  int32_t tokens;    /* rows of the embedding; ids from here on are streams */
  int32_t streams;   /* rows of `stream_rows` */
  int32_t positions; /* rows of the rotary tables; later positions take the last */
  float epsilon;     /* of the norms */
  float scale;       /* of attention's scores */
  mirror_embedding embedding;      /* [tokens, hidden]; must outlive the draft */
  const float* stream_rows;        /* [streams, hidden] or null */
  const float *cosines, *sines;    /* [positions, head_dim / 2] */
  const mirror_layer* layers;      /* [layer_count] */
  const float* norm;               /* [hidden], before the head */
  mirror_matrix head;              /* hidden -> vocabulary */
  const int64_t* vocabulary;       /* [head.out], the tokens of a trimmed head, or null */
} mirror_draft_facts;

typedef struct mirror_draft mirror_draft;
typedef struct mirror_draft_team mirror_draft_team;

/* One pass: `width` rows are appended to the cache at slots past .. past + width - 1.
 *
 * A row sees the slots below its `visible`, and of those up to its own the ones of its branch. */
typedef struct {
  int32_t width, past, capacity;
  const int64_t* ids;          /* [width] */
  const int64_t* positions;    /* [width] */
  const int32_t* visible;      /* [width] */
  const int32_t* row_branch;   /* [width], negative for none */
  const int32_t* slot_branch;  /* [capacity] */
  float* const* keys;          /* [layer_count] of [kv_heads, capacity, head_dim] numbers in an order of our own */
  float* const* values;        /* [layer_count] of [kv_heads, capacity, head_dim] */
  int32_t wanted;              /* rows whose likeliest tokens are asked for */
  const int64_t* wanted_rows;  /* [wanted] */
  int32_t top;                 /* candidates of each; 0 for the likeliest token alone */
  int64_t* token_ids;          /* [wanted], out */
  int64_t* candidate_ids;      /* [wanted, top], out, likeliest first; null if top is 0 */
  float* candidate_logprobs;   /* [wanted, top], out; null if top is 0 */
} mirror_draft_pass;

/* What this CPU runs it with: "amx", "avx512" or "avx2"; null where it has no 8-bit dot products. `wanted` asks for one
 * of them (null or "": the best); null if it isn't there. */
MIRROR_KERNELS_API const char* mirror_kernels_of(const char* wanted);
MIRROR_KERNELS_API int32_t mirror_kernels_version(void);

/* Packs a draft's weights. Null if its sizes don't fit (head_dim must divide by 16), or this CPU can't. */
MIRROR_KERNELS_API mirror_draft* mirror_draft_open(const mirror_draft_facts* facts, const char* kernels);
MIRROR_KERNELS_API void mirror_draft_close(mirror_draft* draft);

/* Threads that run passes, the caller among them, and their working memory; one pass at a time. `spare`: whether nobody
 * else wants their cores between two passes of a rollout, so that they may stay awake for the next one. A team is closed
 * before a draft that it ran. */
MIRROR_KERNELS_API mirror_draft_team* mirror_draft_team_open(int32_t threads, int32_t spare);
MIRROR_KERNELS_API void mirror_draft_team_close(mirror_draft_team* team);

/* Runs a pass; the capacity must divide by 16. Returns 0, or 1 if the sizes don't fit. */
MIRROR_KERNELS_API int32_t mirror_draft_run(const mirror_draft* draft, mirror_draft_team* team,
                                            const mirror_draft_pass* pass);

#ifdef __cplusplus
}
#endif
#endif
