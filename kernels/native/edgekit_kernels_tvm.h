/* Inside edgekit_kernels.c: how kernels compiled by TVM are called without TVM. Not an interface for programs.
 *
 * A compiled kernel is a function of tagged values (tensors as DLPack describes them, integers, floats). It reaches the
 * outside through three pointers and one function that a TVM runtime would supply: parallel launch, scratch memory, and
 * an error text. This file supplies them, for each call its own: several threads may run kernels at the same time.
 *
 * The layouts are those of tvm-ffi 0.1.14 (include/tvm/ffi/c_api.h) and DLPack 1; a test compares them with the headers.
 */
#ifndef EDGEKIT_KERNELS_TVM_H
#define EDGEKIT_KERNELS_TVM_H

#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "edgekit_kernels.h"

#if defined(__GNUC__)
#define EDGEKIT_HIDDEN __attribute__((visibility("hidden")))
#else
#define EDGEKIT_HIDDEN
#endif

/* A program may bring its own allocator: `edgekit_alloc(bytes)` returns memory aligned to 64 bytes, or NULL. */
#ifdef EDGEKIT_CUSTOM_ALLOCATOR
void* edgekit_alloc(size_t bytes);
void edgekit_free(void* memory);
#else
static void* edgekit_alloc(size_t bytes) { return aligned_alloc(64, bytes); /* `bytes` is a multiple of 64 */ }
static void edgekit_free(void* memory) { free(memory); }
#endif

enum { EK_ANY_INT = 1, EK_ANY_FLOAT = 3, EK_ANY_TENSOR = 7 }; /* TVMFFITypeIndex */
enum { EK_DL_CPU = 1, EK_DL_INT = 0, EK_DL_FLOAT = 2 };       /* DLDeviceType, DLDataTypeCode */

typedef struct ek_any { /* TVMFFIAny */
  int32_t type;
  uint32_t zero;
  union {
    int64_t as_int;
    double as_float;
    void* as_pointer;
  } value;
} ek_any;

typedef struct ek_dltensor { /* DLTensor */
  void* data;
  struct {
    int32_t type, id;
  } device;
  int32_t ndim;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
} ek_dltensor;

typedef int (*ek_entry)(void* self, ek_any* args, int32_t count, ek_any* result);

typedef struct ek_group_env { /* TVMParallelGroupEnv */
  void* sync_handle;
  int32_t num_task;
} ek_group_env;

typedef int (*ek_lambda)(int task, ek_group_env* env, void* data);

/* Scratch memory of one call. The header keeps the payload aligned to 64 bytes and lets a call that fails give back what
 * the kernel had not: a kernel that stops early does not free. */
typedef struct ek_block {
  struct ek_block *previous, *next;
  struct ek_call* owner;
} ek_block;
enum { EK_HEADER = 64 };

typedef struct ek_call {
  const edgekit_threads* threads;
  int64_t most_tasks; /* more parts than this would be empty */
  atomic_flag lock;   /* guards what follows: kernels allocate and fail on any thread */
  ek_block* blocks;
  uint64_t missing; /* bytes that could not be had, 0 = none */
  char detail[240]; /* first text a kernel raised */
} ek_call;

static _Thread_local ek_call* ek_current;
static _Thread_local int ek_inside_task;

static void ek_lock(ek_call* call) {
  while (atomic_flag_test_and_set_explicit(&call->lock, memory_order_acquire)) {
  }
}
static void ek_unlock(ek_call* call) { atomic_flag_clear_explicit(&call->lock, memory_order_release); }

static void* ek_workspace(ek_call* call, uint64_t bytes) {
  ek_block* block = NULL;
  if (bytes <= (uint64_t)(PTRDIFF_MAX - 2 * EK_HEADER))
    block = edgekit_alloc(EK_HEADER + (size_t)((bytes + 63) / 64 * 64));
  if (block == NULL) {
    if (call != NULL) {
      ek_lock(call);
      call->missing = bytes > 0 ? bytes : 1;
      ek_unlock(call);
    }
    return NULL;
  }
  block->previous = NULL;
  block->next = NULL;
  block->owner = call;
  if (call != NULL) {
    ek_lock(call);
    block->next = call->blocks;
    if (call->blocks != NULL) call->blocks->previous = block;
    call->blocks = block;
    ek_unlock(call);
  }
  return (char*)block + EK_HEADER;
}

static void ek_release(void* memory) {
  if (memory == NULL) return;
  ek_block* block = (ek_block*)(void*)((char*)memory - EK_HEADER);
  ek_call* call = block->owner;
  if (call != NULL) {
    ek_lock(call);
    if (block->previous != NULL) block->previous->next = block->next;
    if (block->next != NULL) block->next->previous = block->previous;
    if (call->blocks == block) call->blocks = block->next;
    ek_unlock(call);
  }
  edgekit_free(block);
}

/* One parallel loop of a kernel. */
typedef struct ek_group {
  ek_lambda lambda;
  void* data;
  ek_call* call;
  int32_t tasks;
  atomic_int status;
  atomic_int done;
} ek_group;

static void ek_run_task(void* data, int64_t i) {
  ek_group* group = data;
  if (i < 0 || i >= group->tasks) return;
  if (atomic_load_explicit(&group->status, memory_order_relaxed) == 0) {
    ek_call* outer = ek_current;
    int outer_inside = ek_inside_task;
    ek_current = group->call;
    ek_inside_task = 1;
    ek_group_env env = {NULL, group->tasks};
    /* From the back: under a causal mask the last rows cost most, and a long part started last would be waited for. */
    int status = group->lambda((int)(group->tasks - 1 - i), &env, group->data);
    if (status != 0) atomic_store(&group->status, status);
    ek_current = outer;
    ek_inside_task = outer_inside;
  }
  atomic_fetch_add(&group->done, 1);
}

static int ek_parallel_launch(ek_lambda lambda, void* data, int requested) {
  ek_call* call = ek_current;
  (void)requested; /* 0: the kernel splits its loop into as many equal parts as it is told */
  int64_t tasks = 1;
  if (call != NULL && call->threads != NULL && call->threads->max_tasks > 1 && !ek_inside_task) {
    /* Parts are cut before the loop runs and differ in cost: four per thread even that out. */
    tasks = 4 * (int64_t)(call->threads->max_tasks < 4096 ? call->threads->max_tasks : 4096);
    if (tasks > call->most_tasks) tasks = call->most_tasks;
  }
  if (tasks <= 1) {
    ek_group_env env = {NULL, 1};
    return lambda(0, &env, data);
  }
  ek_group group = {.lambda = lambda, .data = data, .call = call, .tasks = (int32_t)tasks};
  atomic_init(&group.status, 0);
  atomic_init(&group.done, 0);
  call->threads->parallel_for(call->threads->context, ek_run_task, &group, tasks);
  if (atomic_load(&group.done) != (int)tasks) {
    ek_lock(call);
    snprintf(call->detail, sizeof call->detail, "parallel_for ran %d of %d tasks", atomic_load(&group.done), (int)tasks);
    ek_unlock(call);
    return -1;
  }
  return atomic_load(&group.status);
}

static void* ek_alloc_workspace(int device_type, int device_id, uint64_t bytes, int code, int bits) {
  (void)device_type, (void)device_id, (void)code, (void)bits;
  return ek_workspace(ek_current, bytes);
}

static int ek_free_workspace(int device_type, int device_id, void* memory) {
  (void)device_type, (void)device_id;
  ek_release(memory);
  return 0;
}

/* The names that compiled kernels refer to; a kernel's own copies are weak and give way to these. */
EDGEKIT_HIDDEN extern int (*__TVMBackendParallelLaunch)(ek_lambda, void*, int);
EDGEKIT_HIDDEN extern void* (*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int);
EDGEKIT_HIDDEN extern int (*__TVMBackendFreeWorkspace)(int, int, void*);
EDGEKIT_HIDDEN void TVMFFIErrorSetRaisedFromCStrParts(const char* kind, const char** parts, int32_t count);

int (*__TVMBackendParallelLaunch)(ek_lambda, void*, int) = ek_parallel_launch;
void* (*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int) = ek_alloc_workspace;
int (*__TVMBackendFreeWorkspace)(int, int, void*) = ek_free_workspace;

void TVMFFIErrorSetRaisedFromCStrParts(const char* kind, const char** parts, int32_t count) {
  ek_call* call = ek_current;
  if (call == NULL) return;
  ek_lock(call);
  if (call->detail[0] == 0) {
    size_t at = (size_t)snprintf(call->detail, sizeof call->detail, "%s: ", kind != NULL ? kind : "error");
    for (int32_t i = 0; i < count && at < sizeof call->detail; i++)
      if (parts[i] != NULL) at += (size_t)snprintf(call->detail + at, sizeof call->detail - at, "%s", parts[i]);
    for (char* c = call->detail; *c != 0; c++)
      if (*c == '\n') *c = ' ';
  }
  ek_unlock(call);
}

#endif /* EDGEKIT_KERNELS_TVM_H */
