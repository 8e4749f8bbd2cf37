/* Inside edgekit_kernels.c: messages, the table of compiled kernels, and one call of one of them. Not an interface. */
#ifndef EDGEKIT_KERNELS_CALL_H
#define EDGEKIT_KERNELS_CALL_H

#include <stdarg.h>

#include "edgekit_kernels_tvm.h"

/* What a kernel can be specialised to. Names as in kernels.json; edgekit_kernels_table.h uses them. */
enum {
  EK_BATCH,
  EK_HEADS,
  EK_KV_HEADS,
  EK_INDEX_HEADS,
  EK_LENGTH,
  EK_KV_LENGTH,
  EK_HEAD_DIM,
  EK_VALUE_DIM,
  EK_BLOCKS_PER_ROW,
  EK_BLOCK_Q,
  EK_BLOCK_K,
  EK_CAUSAL,
  EK_WINDOW,
  EK_CHANNELS,
  EK_STATE,
  EK_GATE,
  EK_DELTA_SOFTPLUS,
  EK_FEATURE_MAP,
  EK_PARAMETERS
};

enum { EK_BSA, EK_KLA, EK_SCAN };
static const char* const ek_op_names[] = {"BlockSparseAttention", "KernelLinearAttention", "SelectiveScan"};
/* What an op takes, where one sentence says it; BlockSparseAttention has a sentence per rule. */
static const char* const ek_op_shapes[] = {
    "",
    "q and k [B, H, N, D] and v [B, H, N, E] with the same B, H and N, each axis at least 1",
    "u and delta [B, C, L], A [C, S], B and C [B, S, L], D [C] and, where given, z [B, C, L], each axis at least 1"};

typedef struct ek_parameter {
  int name;
  int64_t value;
} ek_parameter;

typedef struct ek_variant {
  int op, dtype;
  size_t alignment; /* bytes, of every tensor */
  const char* symbol;
  ek_entry entry;
  int count;
  ek_parameter parameters[EK_PARAMETERS];
} ek_variant;

#include "edgekit_kernels_table.h" /* ek_variants[]: specialised first */

enum { EK_VARIANTS = (int)(sizeof ek_variants / sizeof ek_variants[0]) };

/* Where messages go. */
typedef struct ek_report {
  int op;
  char* text;
  size_t size;
} ek_report;

/* Writes the op's name and the text right behind it (": .." or " takes ..") and returns `code`. */
#if defined(__GNUC__)
__attribute__((format(printf, 3, 4)))
#endif
static int ek_fail(const ek_report* report, int code, const char* format, ...) {
  if (report->text != NULL && report->size > 0) {
    int used = snprintf(report->text, report->size, "%s", ek_op_names[report->op]);
    if (used > 0 && (size_t)used < report->size) {
      va_list values;
      va_start(values, format);
      vsnprintf(report->text + used, report->size - (size_t)used, format, values);
      va_end(values);
    }
  }
  return code;
}

static ek_report ek_start(int op, char* error, size_t size) {
  if (error != NULL && size > 0) error[0] = 0;
  return (ek_report){op, error, error == NULL ? 0 : size};
}

static const char* ek_dtype_name(int dtype) {
  static const char* const names[] = {"float32", "float16", "int32", "float64", "bfloat16", "int64", "bool"};
  return dtype >= 0 && dtype < (int)(sizeof names / sizeof names[0]) ? names[dtype] : "another type";
}
static size_t ek_element_size(int dtype) { return dtype == EDGEKIT_FLOAT16 ? 2 : 4; }

static int64_t ek_ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

/* ---- tensors ---- */

typedef struct ek_tensor {
  const char* name;
  const void* data;
  int dtype, rank;
  int64_t shape[4];
} ek_tensor;

/* Text that grows in a fixed buffer and is cut where that ends. */
typedef struct ek_text {
  size_t used;
  char data[600];
} ek_text;

static void ek_append(ek_text* text, const char* part) {
  while (*part != 0 && text->used + 1 < sizeof text->data) text->data[text->used++] = *part++;
  text->data[text->used] = 0;
}

static void ek_append_shape(ek_text* text, const char* name, int rank, const int64_t* shape) {
  char number[24];
  if (text->used > 0) ek_append(text, ", ");
  ek_append(text, name);
  ek_append(text, " [");
  for (int i = 0; i < rank; i++) {
    snprintf(number, sizeof number, i > 0 ? ", %lld" : "%lld", (long long)shape[i]);
    ek_append(text, number);
  }
  ek_append(text, "]");
}

static int ek_fail_shapes(const ek_report* report, const char* got) {
  return ek_fail(report, EDGEKIT_INVALID, " takes %s; got %s", ek_op_shapes[report->op], got);
}

static int ek_fail_tensors(const ek_report* report, const ek_tensor* tensors, int count) {
  ek_text got = {0};
  for (int i = 0; i < count; i++) ek_append_shape(&got, tensors[i].name, tensors[i].rank, tensors[i].shape);
  return ek_fail_shapes(report, got.data);
}

/* The bytes of the whole tensor, or -1 where they cannot be counted. */
static int64_t ek_countable(const ek_tensor* tensor) {
  int64_t bytes = (int64_t)ek_element_size(tensor->dtype);
  for (int i = 0; i < tensor->rank; i++) {
    if (tensor->shape[i] > (int64_t)(PTRDIFF_MAX / 2) / bytes) return -1;
    bytes *= tensor->shape[i];
  }
  return bytes;
}

static int64_t ek_bytes(const ek_tensor* tensor) {
  int64_t bytes = (int64_t)ek_element_size(tensor->dtype);
  for (int i = 0; i < tensor->rank; i++) bytes *= tensor->shape[i];
  return bytes;
}

/* ---- choosing and calling a kernel ---- */

static const ek_variant* ek_choose(int op, int dtype, const int64_t* values) {
  for (int i = 0; i < EK_VARIANTS; i++) {
    const ek_variant* variant = &ek_variants[i];
    if (variant->op != op || variant->dtype != dtype) continue;
    int fits = 1;
    for (int p = 0; p < variant->count && fits; p++) fits = values[variant->parameters[p].name] == variant->parameters[p].value;
    if (fits) return variant;
  }
  return NULL;
}

/* The last kernel of an op and dtype serves every call: where none was chosen, none was compiled. */
static int ek_refuse(const ek_report* report, int dtype) {
  return ek_fail(report, EDGEKIT_UNSUPPORTED, ": no kernel for %s was compiled into this library", ek_dtype_name(dtype));
}

enum { EK_MOST_TENSORS = 8, EK_MOST_SCALARS = 6 };

typedef struct ek_job {
  const ek_report* report;
  const ek_variant* variant;
  const edgekit_threads* threads;
  int64_t most_tasks;
  int tensor_count; /* the last tensor is the output, written in place */
  ek_tensor tensors[EK_MOST_TENSORS];
  int scalar_count;
  ek_any scalars[EK_MOST_SCALARS];
} ek_job;

static ek_any ek_int(int64_t value) { return (ek_any){.type = EK_ANY_INT, .value.as_int = value}; }
static ek_any ek_float(double value) { return (ek_any){.type = EK_ANY_FLOAT, .value.as_float = value}; }

static int ek_call_kernel(const ek_job* job, ek_call* call) {
  ek_dltensor tensors[EK_MOST_TENSORS];
  int64_t strides[EK_MOST_TENSORS][4];
  ek_any args[EK_MOST_TENSORS + EK_MOST_SCALARS];
  memset(args, 0, sizeof args);
  const int out = job->tensor_count - 1;
  for (int i = 0; i < job->tensor_count; i++) {
    const ek_tensor* tensor = &job->tensors[i];
    void* data = (void*)(uintptr_t)tensor->data;
    size_t alignment = tensor->dtype == EDGEKIT_INT32 ? sizeof(int32_t) : job->variant->alignment;
    if ((uintptr_t)data % alignment != 0) {
      data = ek_workspace(call, (uint64_t)ek_bytes(tensor));
      if (data == NULL) return -1;
      if (i != out) memcpy(data, tensor->data, (size_t)ek_bytes(tensor));
    }
    for (int axis = tensor->rank - 1; axis >= 0; axis--)
      strides[i][axis] = axis == tensor->rank - 1 ? 1 : strides[i][axis + 1] * tensor->shape[axis + 1];
    tensors[i] = (ek_dltensor){.data = data,
                               .device = {EK_DL_CPU, 0},
                               .ndim = tensor->rank,
                               .dtype = {tensor->dtype == EDGEKIT_INT32 ? EK_DL_INT : EK_DL_FLOAT,
                                         (uint8_t)(8 * ek_element_size(tensor->dtype)), 1},
                               .shape = (int64_t*)(uintptr_t)tensor->shape,
                               .strides = strides[i]};
    args[i] = (ek_any){.type = EK_ANY_TENSOR, .value.as_pointer = &tensors[i]};
  }
  for (int i = 0; i < job->scalar_count; i++) args[job->tensor_count + i] = job->scalars[i];
  ek_any result = {0};
  int status = job->variant->entry(NULL, args, job->tensor_count + job->scalar_count, &result);
  if (status == 0 && tensors[out].data != job->tensors[out].data)
    memcpy((void*)(uintptr_t)job->tensors[out].data, tensors[out].data, (size_t)ek_bytes(&job->tensors[out]));
  return status;
}

static int ek_run(const ek_job* job) {
  const edgekit_threads* threads = job->threads;
  if (threads != NULL && threads->parallel_for == NULL)
    return ek_fail(job->report, EDGEKIT_INVALID, ": threads->parallel_for is NULL");
  ek_call call = {.threads = threads, .most_tasks = job->most_tasks, .lock = ATOMIC_FLAG_INIT};
  ek_call* outer = ek_current;
  ek_current = &call;
  int status = ek_call_kernel(job, &call);
  ek_current = outer;
  while (call.blocks != NULL) ek_release((char*)call.blocks + EK_HEADER);
  if (call.missing > 0)
    return ek_fail(job->report, EDGEKIT_OUT_OF_MEMORY, ": %llu bytes of scratch memory could not be had",
                   (unsigned long long)call.missing);
  if (status != 0)
    return ek_fail(job->report, EDGEKIT_INTERNAL, ": kernel %s failed: %s; this is a defect of edgekit, please report it",
                   job->variant->symbol, call.detail[0] != 0 ? call.detail : "no reason given");
  return EDGEKIT_OK;
}

#endif /* EDGEKIT_KERNELS_CALL_H */
