/* edgekit's CPU kernels: the checks of each op's contract, the choice of a compiled kernel, and the call.
 *
 * Everything a kernel takes for granted is checked here and nowhere else: agreeing shapes, extents of at least 1, sizes that
 * fit in memory, block indices in range, finite attributes, aligned pointers. The wording is that of the Python contract.
 */
#include "edgekit_kernels.h"

#include <float.h>
#include <math.h>

#include "edgekit_kernels_call.h"

/* Checks that hold for each op: the dtype is one that kernels have, no axis is empty, sizes can be counted, nothing is NULL. */
static int ek_check_dtype(const ek_report* report, int dtype) {
  if (dtype == EDGEKIT_FLOAT32 || dtype == EDGEKIT_FLOAT16) return EDGEKIT_OK;
  return ek_fail(report, EDGEKIT_INVALID, " takes tensors of one dtype out of float32, float16; got %s", ek_dtype_name(dtype));
}

static int ek_check_tensors(const ek_job* job) {
  const int inputs = job->tensor_count - 1;
  for (int i = 0; i < job->tensor_count; i++)
    for (int axis = 0; axis < job->tensors[i].rank; axis++)
      if (job->tensors[i].shape[axis] < 1) return ek_fail_tensors(job->report, job->tensors, inputs);
  for (int i = 0; i < job->tensor_count; i++)
    if (ek_countable(&job->tensors[i]) < 0) {
      ek_text got = {0};
      ek_append_shape(&got, job->tensors[i].name, job->tensors[i].rank, job->tensors[i].shape);
      return ek_fail(job->report, EDGEKIT_INVALID, ": %s is more than memory can hold", got.data);
    }
  for (int i = 0; i < job->tensor_count; i++)
    if (job->tensors[i].data == NULL) return ek_fail(job->report, EDGEKIT_INVALID, ": %s is NULL", job->tensors[i].name);
  return EDGEKIT_OK;
}

/* ---- tensors from a framework: ranks, dtypes, agreeing shapes ---- */

/* One tensor of an op's signature; `axes` names its extents, equal letters must agree ("BHND"). */
typedef struct ek_expected {
  const char* name;
  const char* axes;
  const edgekit_tensor* tensor;
} ek_expected;

static int ek_check_dtypes(const ek_report* report, const ek_expected* expected, int count) {
  int wrong = 0, first = expected[0].tensor->dtype;
  ek_text got = {0};
  for (int i = 0; i < count; i++) {
    int dtype = expected[i].tensor->dtype;
    wrong |= dtype != first;
    if (i > 0) ek_append(&got, ", ");
    ek_append(&got, expected[i].name);
    ek_append(&got, " ");
    ek_append(&got, ek_dtype_name(dtype));
  }
  if (!wrong && (first == EDGEKIT_FLOAT32 || first == EDGEKIT_FLOAT16)) return EDGEKIT_OK;
  return ek_fail(report, EDGEKIT_INVALID, " takes %s of one dtype out of float32, float16; got %s. Convert them to one dtype",
                 report->op == EK_SCAN ? "tensors" : "q, k and v", got.data);
}

static int ek_check_shapes(const ek_report* report, const ek_expected* expected, int count, int64_t extent[128]) {
  int agree = 1;
  ek_text got = {0};
  for (int i = 0; i < count; i++)
    if (expected[i].tensor == NULL || expected[i].tensor->rank < 0 ||
        (expected[i].tensor->rank > 0 && expected[i].tensor->shape == NULL))
      return ek_fail(report, EDGEKIT_INVALID, ": %s is NULL", expected[i].name);
  memset(extent, 0, 128 * sizeof extent[0]);
  for (int i = 0; i < count; i++) {
    const edgekit_tensor* tensor = expected[i].tensor;
    ek_append_shape(&got, expected[i].name, tensor->rank, tensor->shape);
    if (tensor->rank != (int)strlen(expected[i].axes)) agree = 0;
    for (int axis = 0; axis < tensor->rank && agree; axis++) {
      int64_t* known = &extent[expected[i].axes[axis] & 127];
      if (*known == 0) *known = tensor->shape[axis];
      agree = tensor->shape[axis] >= 1 && *known == tensor->shape[axis];
    }
  }
  return agree ? ek_check_dtypes(report, expected, count) : ek_fail_shapes(report, got.data);
}

/* ---- BlockSparseAttention ---- */

static int ek_bsa_attributes(const ek_report* report, const edgekit_bsa_args* args) {
  if (args->block_q < 1)
    return ek_fail(report, EDGEKIT_INVALID, " needs block_q of at least 1, got %lld", (long long)args->block_q);
  if (args->block_k < 1)
    return ek_fail(report, EDGEKIT_INVALID, " needs block_k of at least 1, got %lld", (long long)args->block_k);
  if (!isfinite(args->scale) || args->scale == 0.0F)
    return ek_fail(report, EDGEKIT_INVALID, " needs a scale that is finite and not 0, got %g", (double)args->scale);
  if (!isfinite(args->softcap) || args->softcap < 0.0F)
    return ek_fail(report, EDGEKIT_INVALID, " needs a softcap that is finite and at least 0 (0 for none), got %g",
                   (double)args->softcap);
  if (args->softcap > 0.0F && args->softcap < FLT_MIN)
    return ek_fail(report, EDGEKIT_INVALID,
                   " needs a softcap of 0 (none) or a normal float32 number (1.17549e-38 to 3.40282e+38), got %g",
                   (double)args->softcap);
  if (args->softcap > 0.0F && !isfinite(args->scale / args->softcap)) /* the kernel's factor: 0 times infinity is NaN */
    return ek_fail(report, EDGEKIT_INVALID, " needs a scale / softcap that float32 can hold, got %g / %g",
                   (double)args->scale, (double)args->softcap);
  if (args->window < 0)
    return ek_fail(report, EDGEKIT_INVALID, " needs a window of at least 0 (0 for none), got %lld", (long long)args->window);
  if (args->causal != 0 && args->causal != 1)
    return ek_fail(report, EDGEKIT_INVALID, " needs causal to be 0 or 1, got %lld", (long long)args->causal);
  return EDGEKIT_OK;
}

/* The rule that the shapes of q, k, v, block_index break first, or NULL. */
static const char* ek_bsa_broken_rule(const edgekit_tensor* t[4], int64_t block_q) {
  const char* rank = " takes q [B, Hq, N, D], k and v [B, Hkv, M, D], block_index [B, Hm, ceil(N / block_q), K]";
  const char* index = " needs block_index [B, Hm, ceil(N / block_q), K] with Hm one of 1, Hkv, Hq";
  for (int i = 0; i < 4; i++)
    if (t[i]->rank != 4) return rank;
  const int64_t *q = t[0]->shape, *k = t[1]->shape, *v = t[2]->shape, *b = t[3]->shape;
  for (int axis = 0; axis < 4; axis++)
    if (q[axis] < 1 || k[axis] < 1 || v[axis] < 1 || b[axis] < 1)
      return " needs every axis of q, k, v and block_index to be at least 1";
  if (memcmp(k, v, 4 * sizeof k[0]) != 0 || k[0] != q[0] || k[3] != q[3])
    return " needs k and v of one shape, and the batch and head_dim of q";
  if (q[1] % k[1] != 0) return " needs a number of query heads that is a multiple of the number of key heads";
  if (k[2] < q[2]) return " needs at least as many keys as queries (M >= N): the last query sits at the last key";
  if (b[0] != q[0] || b[2] != ek_ceil_div(q[2], block_q)) return index;
  return b[1] == 1 || b[1] == k[1] || b[1] == q[1] ? NULL : index;
}

static int ek_bsa_check_shapes(const ek_report* report, const edgekit_tensor* tensors[4], int64_t block_q) {
  static const char* const names[] = {"q", "k", "v", "block_index"};
  const char* broken = ek_bsa_broken_rule(tensors, block_q);
  if (broken == NULL) return EDGEKIT_OK;
  ek_text got = {0};
  for (int i = 0; i < 4; i++) ek_append_shape(&got, names[i], tensors[i]->rank, tensors[i]->shape);
  return ek_fail(report, EDGEKIT_INVALID, "%s; got %s", broken, got.data);
}

static int ek_bsa_indices(const ek_report* report, const edgekit_bsa_args* args, const ek_tensor* index) {
  const int64_t blocks = ek_ceil_div(args->kv_length, args->block_k);
  const int64_t count = ek_bytes(index) / (int64_t)sizeof(int32_t);
  const char* data = (const char*)args->block_index; /* may be misaligned: read by memcpy */
  for (int64_t i = 0; i < count; i++) {
    int32_t block;
    memcpy(&block, data + i * (int64_t)sizeof block, sizeof block);
    if (block < -1 || block >= blocks)
      return ek_fail(report, EDGEKIT_INVALID,
                     " got block index %d out of range -1..%lld: %lld keys make %lld blocks of %lld; -1 stands for none",
                     (int)block, (long long)(blocks - 1), (long long)args->kv_length, (long long)blocks,
                     (long long)args->block_k);
  }
  return EDGEKIT_OK;
}

static void ek_bsa_values(const edgekit_bsa_args* args, int64_t values[EK_PARAMETERS]) {
  memset(values, 0, EK_PARAMETERS * sizeof values[0]);
  values[EK_BATCH] = args->batch;
  values[EK_HEADS] = args->q_heads;
  values[EK_KV_HEADS] = args->kv_heads;
  values[EK_INDEX_HEADS] = args->index_heads;
  values[EK_LENGTH] = args->q_length;
  values[EK_KV_LENGTH] = args->kv_length;
  values[EK_HEAD_DIM] = args->head_dim;
  values[EK_BLOCKS_PER_ROW] = args->blocks_per_row;
  values[EK_BLOCK_Q] = args->block_q;
  values[EK_BLOCK_K] = args->block_k;
  values[EK_CAUSAL] = args->causal;
  values[EK_WINDOW] = args->window < args->kv_length ? args->window : 0; /* reaches every key: as good as none */
}

int edgekit_block_sparse_attention(const edgekit_bsa_args* args, const edgekit_threads* threads, char* error,
                                   size_t error_size) {
  ek_report report = ek_start(EK_BSA, error, error_size);
  if (args == NULL) return ek_fail(&report, EDGEKIT_INVALID, ": args is NULL");
  int status = ek_check_dtype(&report, args->dtype);
  if (status == EDGEKIT_OK) status = ek_bsa_attributes(&report, args);
  if (status != EDGEKIT_OK) return status;
  const int64_t rows = args->q_length >= 1 ? ek_ceil_div(args->q_length, args->block_q) : 1;
  const int t = args->dtype;
  ek_job job = {
      .report = &report,
      .threads = threads,
      .tensor_count = 5,
      .tensors = {{"q", args->q, t, 4, {args->batch, args->q_heads, args->q_length, args->head_dim}},
                  {"k", args->k, t, 4, {args->batch, args->kv_heads, args->kv_length, args->head_dim}},
                  {"v", args->v, t, 4, {args->batch, args->kv_heads, args->kv_length, args->head_dim}},
                  {"block_index", args->block_index, EDGEKIT_INT32, 4,
                   {args->batch, args->index_heads, rows, args->blocks_per_row}},
                  {"out", args->out, t, 4, {args->batch, args->q_heads, args->q_length, args->head_dim}}},
  };
  edgekit_tensor views[4];
  const edgekit_tensor* tensors[4];
  for (int i = 0; i < 4; i++) {
    views[i] = (edgekit_tensor){NULL, job.tensors[i].dtype, 4, job.tensors[i].shape};
    tensors[i] = &views[i];
  }
  status = ek_bsa_check_shapes(&report, tensors, args->block_q);
  if (status == EDGEKIT_OK) status = ek_check_tensors(&job);
  if (status == EDGEKIT_OK) status = ek_bsa_indices(&report, args, &job.tensors[3]);
  if (status != EDGEKIT_OK) return status;
  int64_t values[EK_PARAMETERS];
  ek_bsa_values(args, values);
  job.variant = ek_choose(EK_BSA, args->dtype, values);
  if (job.variant == NULL) return ek_refuse(&report, args->dtype);
  job.most_tasks = args->batch * args->q_heads * rows;
  /* A block longer than its sequence is as good as one of that length, and keeps the kernel's sums in range. */
  const ek_any scalars[] = {ek_float((double)args->scale), ek_float((double)args->softcap), ek_int(args->causal),
                            ek_int(values[EK_WINDOW]),
                            ek_int(args->block_q < args->q_length ? args->block_q : args->q_length),
                            ek_int(args->block_k < args->kv_length ? args->block_k : args->kv_length)};
  job.scalar_count = 6;
  memcpy(job.scalars, scalars, sizeof scalars);
  return ek_run(&job);
}

int edgekit_bsa_shapes(const edgekit_tensor* q, const edgekit_tensor* k, const edgekit_tensor* v,
                       const edgekit_tensor* block_index, edgekit_bsa_args* args, char* error, size_t error_size) {
  ek_report report = ek_start(EK_BSA, error, error_size);
  if (args == NULL) return ek_fail(&report, EDGEKIT_INVALID, ": args is NULL");
  const edgekit_tensor* tensors[4] = {q, k, v, block_index};
  for (int i = 0; i < 4; i++)
    if (tensors[i] == NULL || tensors[i]->rank < 0 || (tensors[i]->rank > 0 && tensors[i]->shape == NULL))
      return ek_fail(&report, EDGEKIT_INVALID, ": input %d is NULL", i);
  int status = ek_bsa_attributes(&report, args);
  if (status == EDGEKIT_OK) status = ek_bsa_check_shapes(&report, tensors, args->block_q);
  if (status != EDGEKIT_OK) return status;
  if ((q->dtype != EDGEKIT_FLOAT32 && q->dtype != EDGEKIT_FLOAT16) || k->dtype != q->dtype || v->dtype != q->dtype)
    return ek_fail(&report, EDGEKIT_INVALID, " takes q, k, v of one dtype of float32, float16; got %s, %s, %s",
                   ek_dtype_name(q->dtype), ek_dtype_name(k->dtype), ek_dtype_name(v->dtype));
  if (block_index->dtype != EDGEKIT_INT32)
    return ek_fail(&report, EDGEKIT_INVALID, " takes block_index as int32, got %s; convert it",
                   ek_dtype_name(block_index->dtype));
  args->dtype = q->dtype;
  args->q = q->data, args->k = k->data, args->v = v->data, args->block_index = block_index->data;
  args->batch = q->shape[0], args->q_heads = q->shape[1], args->q_length = q->shape[2], args->head_dim = q->shape[3];
  args->kv_heads = k->shape[1], args->kv_length = k->shape[2];
  args->index_heads = block_index->shape[1], args->blocks_per_row = block_index->shape[3];
  return EDGEKIT_OK;
}

const char* edgekit_bsa_kernel(const edgekit_bsa_args* args) {
  int64_t values[EK_PARAMETERS];
  if (args == NULL) return NULL;
  ek_bsa_values(args, values);
  const ek_variant* variant = ek_choose(EK_BSA, args->dtype, values);
  return variant != NULL ? variant->symbol : NULL;
}

int edgekit_bsa_attributes(const edgekit_bsa_args* args, char* error, size_t error_size) {
  ek_report report = ek_start(EK_BSA, error, error_size);
  return args == NULL ? ek_fail(&report, EDGEKIT_INVALID, ": args is NULL") : ek_bsa_attributes(&report, args);
}

/* ---- KernelLinearAttention ---- */

static int ek_kla_attributes(const ek_report* report, const edgekit_kla_args* args) {
  if (args->feature_map < EDGEKIT_RELU || args->feature_map > EDGEKIT_IDENTITY)
    return ek_fail(report, EDGEKIT_INVALID, " takes feature_map 0 (relu), 1 (elu1) or 2 (identity); got %lld",
                   (long long)args->feature_map);
  if (!isfinite(args->eps) || args->eps < 0.0F)
    return ek_fail(report, EDGEKIT_INVALID, " takes a finite eps >= 0; got %g. The usual one is 1e-6", (double)args->eps);
  if (args->eps > 0.0F && args->eps < FLT_MIN)
    return ek_fail(report, EDGEKIT_INVALID,
                   " takes eps 0 or a normal float32 number (1.17549e-38 to 3.40282e+38); got %g. The usual one is 1e-6",
                   (double)args->eps);
  return EDGEKIT_OK;
}

static void ek_kla_values(const edgekit_kla_args* args, int64_t values[EK_PARAMETERS]) {
  memset(values, 0, EK_PARAMETERS * sizeof values[0]);
  values[EK_BATCH] = args->batch;
  values[EK_HEADS] = args->heads;
  values[EK_LENGTH] = args->length;
  values[EK_HEAD_DIM] = args->head_dim;
  values[EK_VALUE_DIM] = args->value_dim;
  values[EK_FEATURE_MAP] = args->feature_map;
}

int edgekit_kernel_linear_attention(const edgekit_kla_args* args, const edgekit_threads* threads, char* error,
                                    size_t error_size) {
  ek_report report = ek_start(EK_KLA, error, error_size);
  if (args == NULL) return ek_fail(&report, EDGEKIT_INVALID, ": args is NULL");
  int status = ek_check_dtype(&report, args->dtype);
  if (status != EDGEKIT_OK) return status;
  status = ek_kla_attributes(&report, args);
  if (status != EDGEKIT_OK) return status;
  const int t = args->dtype;
  ek_job job = {
      .report = &report,
      .threads = threads,
      .tensor_count = 4,
      .tensors = {{"q", args->q, t, 4, {args->batch, args->heads, args->length, args->head_dim}},
                  {"k", args->k, t, 4, {args->batch, args->heads, args->length, args->head_dim}},
                  {"v", args->v, t, 4, {args->batch, args->heads, args->length, args->value_dim}},
                  {"out", args->out, t, 4, {args->batch, args->heads, args->length, args->value_dim}}},
      .scalar_count = 2,
      .scalars = {ek_float((double)args->eps), ek_int(args->feature_map)},
  };
  status = ek_check_tensors(&job);
  if (status != EDGEKIT_OK) return status;
  int64_t values[EK_PARAMETERS];
  ek_kla_values(args, values);
  job.variant = ek_choose(EK_KLA, args->dtype, values);
  if (job.variant == NULL) return ek_refuse(&report, args->dtype);
  job.most_tasks = args->batch * args->heads * args->length;
  return ek_run(&job);
}

int edgekit_kla_shapes(const edgekit_tensor* q, const edgekit_tensor* k, const edgekit_tensor* v, edgekit_kla_args* args,
                       char* error, size_t error_size) {
  ek_report report = ek_start(EK_KLA, error, error_size);
  if (args == NULL) return ek_fail(&report, EDGEKIT_INVALID, ": args is NULL");
  const ek_expected expected[] = {{"q", "BHND", q}, {"k", "BHND", k}, {"v", "BHNE", v}};
  int64_t extent[128];
  int status = ek_check_shapes(&report, expected, 3, extent);
  if (status != EDGEKIT_OK) return status;
  args->dtype = q->dtype;
  args->q = q->data, args->k = k->data, args->v = v->data;
  args->batch = extent['B'], args->heads = extent['H'], args->length = extent['N'];
  args->head_dim = extent['D'], args->value_dim = extent['E'];
  return EDGEKIT_OK;
}

int edgekit_kla_attributes(const edgekit_kla_args* args, char* error, size_t error_size) {
  ek_report report = ek_start(EK_KLA, error, error_size);
  return args == NULL ? ek_fail(&report, EDGEKIT_INVALID, ": args is NULL") : ek_kla_attributes(&report, args);
}

const char* edgekit_kla_kernel(const edgekit_kla_args* args) {
  int64_t values[EK_PARAMETERS];
  if (args == NULL) return NULL;
  ek_kla_values(args, values);
  const ek_variant* variant = ek_choose(EK_KLA, args->dtype, values);
  return variant != NULL ? variant->symbol : NULL;
}

/* ---- SelectiveScan ---- */

static int ek_scan_attributes(const ek_report* report, const edgekit_scan_args* args) {
  if (args->delta_softplus == 0 || args->delta_softplus == 1) return EDGEKIT_OK;
  return ek_fail(report, EDGEKIT_INVALID, " takes delta_softplus 0 or 1; got %lld", (long long)args->delta_softplus);
}

static void ek_scan_values(const edgekit_scan_args* args, int64_t values[EK_PARAMETERS]) {
  memset(values, 0, EK_PARAMETERS * sizeof values[0]);
  values[EK_BATCH] = args->batch;
  values[EK_CHANNELS] = args->channels;
  values[EK_LENGTH] = args->length;
  values[EK_STATE] = args->state;
  values[EK_GATE] = args->z != NULL;
  values[EK_DELTA_SOFTPLUS] = args->delta_softplus;
}

int edgekit_selective_scan(const edgekit_scan_args* args, const edgekit_threads* threads, char* error, size_t error_size) {
  ek_report report = ek_start(EK_SCAN, error, error_size);
  if (args == NULL) return ek_fail(&report, EDGEKIT_INVALID, ": args is NULL");
  int status = ek_check_dtype(&report, args->dtype);
  if (status == EDGEKIT_OK) status = ek_scan_attributes(&report, args);
  if (status != EDGEKIT_OK) return status;
  const int t = args->dtype;
  const int64_t b = args->batch, c = args->channels, l = args->length, s = args->state;
  const int gated = args->z != NULL;
  ek_job job = {
      .report = &report,
      .threads = threads,
      .tensor_count = 8,
      .tensors = {{"u", args->u, t, 3, {b, c, l}},
                  {"delta", args->delta, t, 3, {b, c, l}},
                  {"A", args->A, t, 2, {c, s}},
                  {"B", args->B, t, 3, {b, s, l}},
                  {"C", args->C, t, 3, {b, s, l}},
                  {"D", args->D, t, 1, {c}},
                  {"z", gated ? args->z : args->u, t, 3, {b, c, l}}, /* without a gate the kernel does not read it */
                  {"out", args->out, t, 3, {b, c, l}}},
      .scalar_count = 2,
      .scalars = {ek_int(args->delta_softplus), ek_int(gated)},
  };
  status = ek_check_tensors(&job);
  if (status != EDGEKIT_OK) return status;
  int64_t values[EK_PARAMETERS];
  ek_scan_values(args, values);
  job.variant = ek_choose(EK_SCAN, args->dtype, values);
  if (job.variant == NULL) return ek_refuse(&report, args->dtype);
  job.most_tasks = b * c;
  return ek_run(&job);
}

int edgekit_scan_shapes(const edgekit_tensor* u, const edgekit_tensor* delta, const edgekit_tensor* A, const edgekit_tensor* B,
                        const edgekit_tensor* C, const edgekit_tensor* D, const edgekit_tensor* z, edgekit_scan_args* args,
                        char* error, size_t error_size) {
  ek_report report = ek_start(EK_SCAN, error, error_size);
  if (args == NULL) return ek_fail(&report, EDGEKIT_INVALID, ": args is NULL");
  const ek_expected expected[] = {{"u", "BCL", u}, {"delta", "BCL", delta}, {"A", "CS", A}, {"B", "BSL", B},
                                  {"C", "BSL", C}, {"D", "C", D},           {"z", "BCL", z}};
  int64_t extent[128];
  int status = ek_check_shapes(&report, expected, z != NULL ? 7 : 6, extent);
  if (status != EDGEKIT_OK) return status;
  /* Everywhere else a NULL z means no gate; a tensor without data must not turn into that. */
  if (z != NULL && z->data == NULL) return ek_fail(&report, EDGEKIT_INVALID, ": z is NULL");
  args->dtype = u->dtype;
  args->u = u->data, args->delta = delta->data, args->A = A->data, args->B = B->data, args->C = C->data, args->D = D->data;
  args->z = z != NULL ? z->data : NULL;
  args->batch = extent['B'], args->channels = extent['C'], args->length = extent['L'], args->state = extent['S'];
  return EDGEKIT_OK;
}

int edgekit_scan_attributes(const edgekit_scan_args* args, char* error, size_t error_size) {
  ek_report report = ek_start(EK_SCAN, error, error_size);
  return args == NULL ? ek_fail(&report, EDGEKIT_INVALID, ": args is NULL") : ek_scan_attributes(&report, args);
}

const char* edgekit_scan_kernel(const edgekit_scan_args* args) {
  int64_t values[EK_PARAMETERS];
  if (args == NULL) return NULL;
  ek_scan_values(args, values);
  const ek_variant* variant = ek_choose(EK_SCAN, args->dtype, values);
  return variant != NULL ? variant->symbol : NULL;
}

/* ---- the rest ---- */

int edgekit_feature_map(const char* name) {
  static const char* const names[] = {"relu", "elu1", "identity"};
  for (int i = 0; i < 3; i++)
    if (name != NULL && strcmp(name, names[i]) == 0) return i;
  return -1;
}

int edgekit_kernels_abi(void) { return EDGEKIT_KERNELS_ABI; }
