/* edgekit's CPU kernels for C and C++: block-sparse attention, kernel linear attention, selective scan.
 *
 * A program links edgekit_kernels.c (with the headers that edgekit writes next to it) and the compiled kernels
 * (edgekit_*.o), with -lm and nothing else: no Python, no TVM, no onnxruntime.
 *
 *     cc app.c edgekit_kernels.c edgekit_*.o -lm
 *
 * Every function returns EDGEKIT_OK or one of the codes below and then writes one line of English, ended by a zero byte,
 * into `error` (cut to `error_size`; may be NULL with size 0). A call that fails leaves no memory behind; what it had
 * written of the output is unspecified. Calls may be made from several threads at once.
 *
 * All tensors are dense and row-major. Inputs are only read; the output must not overlap them. A pointer that is not
 * aligned to its element is served through an aligned copy.
 */
#ifndef EDGEKIT_KERNELS_H
#define EDGEKIT_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(EDGEKIT_KERNELS_SHARED) && defined(__GNUC__)
#define EDGEKIT_API __attribute__((visibility("default")))
#else
#define EDGEKIT_API
#endif

/* Version of this interface: grows when a struct below changes. */
#define EDGEKIT_KERNELS_ABI 1

/* What a call returns. */
enum {
  EDGEKIT_OK = 0,
  EDGEKIT_INVALID = 1,       /* an argument breaks the contract: shape, dtype, index, attribute, NULL */
  EDGEKIT_UNSUPPORTED = 2,   /* a valid call of an op or dtype that was not compiled in */
  EDGEKIT_OUT_OF_MEMORY = 3, /* scratch memory could not be had */
  EDGEKIT_INTERNAL = 4       /* a kernel refused what the checks let through: a defect of edgekit */
};

/* Element types. Sums, exponentials and the scan's state are float32 in either case. */
enum {
  EDGEKIT_FLOAT32 = 0,
  EDGEKIT_FLOAT16 = 1,
  EDGEKIT_INT32 = 2,
  /* Not computed with; named so that a message can say what arrived. */
  EDGEKIT_FLOAT64 = 3,
  EDGEKIT_BFLOAT16 = 4,
  EDGEKIT_INT64 = 5,
  EDGEKIT_BOOL = 6,
  EDGEKIT_OTHER = 7
};

/* Feature maps of kernel linear attention. */
enum { EDGEKIT_RELU = 0, EDGEKIT_ELU1 = 1, EDGEKIT_IDENTITY = 2 };

/* How work is spread over threads: NULL in place of this struct runs everything on the calling thread.
 *
 * parallel_for must call task(data, i) exactly once for each i in [0, n), in any order, on any threads, and return when
 * all are done. It must not let exceptions out. max_tasks is about how many of them can run at once.
 */
typedef struct edgekit_threads {
  void (*parallel_for)(void* context, void (*task)(void* data, int64_t i), void* data, int64_t n);
  void* context;
  int max_tasks;
} edgekit_threads;

/* A dense row-major tensor as frameworks hold it, for edgekit_*_shapes. */
typedef struct edgekit_tensor {
  const void* data;
  int dtype;            /* EDGEKIT_FLOAT32, .. ; any other value is refused with a message */
  int rank;
  const int64_t* shape; /* `rank` extents */
} edgekit_tensor;

/* Block-sparse attention: out = softmax(scale q k^T, over the listed key blocks) v.
 *
 * Query i stands at key position i + kv_length - q_length. Row i / block_q of block_index lists the blocks of block_k keys
 * that the query may see, in any order; -1 means none and a repeated block counts once. Query head h uses key head
 * h / (q_heads / kv_heads). A query that may see no key gives zeros.
 */
typedef struct edgekit_bsa_args {
  int dtype;                 /* of q, k, v and out */
  const void* q;             /* [batch, q_heads, q_length, head_dim] */
  const void* k;             /* [batch, kv_heads, kv_length, head_dim] */
  const void* v;             /* [batch, kv_heads, kv_length, head_dim] */
  const int32_t* block_index; /* [batch, index_heads, ceil(q_length / block_q), blocks_per_row] */
  void* out;                 /* [batch, q_heads, q_length, head_dim] */
  int64_t batch, q_heads, kv_heads, index_heads; /* index_heads is 1, kv_heads or q_heads */
  int64_t q_length, kv_length, head_dim, blocks_per_row;
  int64_t block_q, block_k;
  int64_t causal; /* 0 or 1 */
  int64_t window; /* 0 = none; else a key must lie less than this many positions from the query */
  float scale;    /* usually 1 / sqrt(head_dim); finite and not 0 */
  float softcap;  /* 0 = none; else a normal number, and scores become softcap * tanh(score / softcap) */
} edgekit_bsa_args;

/* Kernel linear attention (not causal): out_i = phi(q_i)^T S / (phi(q_i)^T s + eps), S = mean_j phi(k_j) v_j^T, s = mean_j phi(k_j). */
typedef struct edgekit_kla_args {
  int dtype;
  const void* q; /* [batch, heads, length, head_dim] */
  const void* k; /* [batch, heads, length, head_dim] */
  const void* v; /* [batch, heads, length, value_dim] */
  void* out;     /* [batch, heads, length, value_dim] */
  int64_t batch, heads, length, head_dim, value_dim;
  int64_t feature_map; /* EDGEKIT_RELU, .. */
  float eps;           /* 0, or positive, finite and not denormal */
} edgekit_kla_args;

/* Selective scan: h_t = exp(delta_t A) h_(t-1) + delta_t B_t u_t; out_t = (C_t . h_t + D u_t) [* silu(z_t)]. */
typedef struct edgekit_scan_args {
  int dtype;
  const void* u;     /* [batch, channels, length] */
  const void* delta; /* [batch, channels, length] */
  const void* A;     /* [channels, state] */
  const void* B;     /* [batch, state, length] */
  const void* C;     /* [batch, state, length] */
  const void* D;     /* [channels] */
  const void* z;     /* [batch, channels, length], or NULL for no gate */
  void* out;         /* [batch, channels, length] */
  int64_t batch, channels, length, state;
  int64_t delta_softplus; /* 0 or 1: delta = softplus(delta) first */
} edgekit_scan_args;

/* Run an op. `threads` may be NULL. */
EDGEKIT_API int edgekit_block_sparse_attention(const edgekit_bsa_args* args, const edgekit_threads* threads, char* error,
                                               size_t error_size);
EDGEKIT_API int edgekit_kernel_linear_attention(const edgekit_kla_args* args, const edgekit_threads* threads, char* error,
                                                size_t error_size);
EDGEKIT_API int edgekit_selective_scan(const edgekit_scan_args* args, const edgekit_threads* threads, char* error,
                                       size_t error_size);

/* Fill the pointers, dtype and sizes of `args` from tensors, checking ranks, dtypes and that the shapes agree. The
 * attributes are read where the shapes depend on them (block_q, block_k) and otherwise left as they are; so is `out`. A z
 * without data is refused: no gate is no z. */
EDGEKIT_API int edgekit_bsa_shapes(const edgekit_tensor* q, const edgekit_tensor* k, const edgekit_tensor* v,
                                   const edgekit_tensor* block_index, edgekit_bsa_args* args, char* error,
                                   size_t error_size);
EDGEKIT_API int edgekit_kla_shapes(const edgekit_tensor* q, const edgekit_tensor* k, const edgekit_tensor* v,
                                   edgekit_kla_args* args, char* error, size_t error_size);
EDGEKIT_API int edgekit_scan_shapes(const edgekit_tensor* u, const edgekit_tensor* delta, const edgekit_tensor* A,
                                    const edgekit_tensor* B, const edgekit_tensor* C, const edgekit_tensor* D,
                                    const edgekit_tensor* z /* or NULL */, edgekit_scan_args* args, char* error,
                                    size_t error_size);

/* Check the attributes alone (a framework knows them before it has tensors). */
EDGEKIT_API int edgekit_bsa_attributes(const edgekit_bsa_args* args, char* error, size_t error_size);
EDGEKIT_API int edgekit_kla_attributes(const edgekit_kla_args* args, char* error, size_t error_size);
EDGEKIT_API int edgekit_scan_attributes(const edgekit_scan_args* args, char* error, size_t error_size);

/* The feature map called `name` ("relu", "elu1", "identity"), or -1. */
EDGEKIT_API int edgekit_feature_map(const char* name);

/* Name of the kernel that would serve the call ("edgekit_bsa_f32_d64_b64"), or NULL when none does. */
EDGEKIT_API const char* edgekit_bsa_kernel(const edgekit_bsa_args* args);
EDGEKIT_API const char* edgekit_kla_kernel(const edgekit_kla_args* args);
EDGEKIT_API const char* edgekit_scan_kernel(const edgekit_scan_args* args);

/* EDGEKIT_KERNELS_ABI of the compiled library. */
EDGEKIT_API int edgekit_kernels_abi(void);

#ifdef __cplusplus
}
#endif

#endif /* EDGEKIT_KERNELS_H */
