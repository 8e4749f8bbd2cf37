/* Runs edgekit's kernels on cases from standard input, for tests: on this machine, under qemu, under sanitizers.
 *
 * A case, little-endian: nine int64 (op, dtype, threads, placement, allocation to fail, counts of ints, floats and tensors,
 * bytes of the output), the ints as int64, the floats as double, then per tensor its bytes as int64 (-1: a NULL pointer) and
 * the bytes. Floats are attributes, ints are sizes and attributes in the order of the op's args struct. The answer: int64
 * code, 512 bytes of message, the output.
 *
 * Every tensor lies between two pages that cannot be touched: with placement p >= 0 it ends p bytes before the second, with -1
 * it starts right behind the first. The bytes left over hold a pattern that must survive. Under AddressSanitizer tensors are
 * plain allocations of just their size instead, and the sanitizer watches what lies around them.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "edgekit_kernels.h"

enum { MESSAGE = 512, MOST = 16, PATTERN = 0xA5, WROTE_OUTSIDE = 99 };

#ifndef __SANITIZE_ADDRESS__
static size_t page(void) { return (size_t)sysconf(_SC_PAGESIZE); }
#endif

static void check(int sound, const char* text) {
  if (sound) return;
  fprintf(stderr, "native_driver: %s\n", text);
  exit(3);
}

typedef struct {
  unsigned char* base; /* NULL: no memory */
  size_t mapped;       /* between the guards */
  unsigned char* data;
  size_t bytes;
} guarded;

#ifdef __SANITIZE_ADDRESS__
static guarded guarded_make(size_t bytes, int64_t placement, int fill) {
  size_t slack = placement > 0 ? (size_t)placement : 0;
  guarded g = {.bytes = bytes};
  void* base = NULL;
  check(posix_memalign(&base, 64, bytes + slack) == 0, "no memory");
  g.base = base;
  g.data = g.base + slack;
  memset(g.data, fill, bytes);
  return g;
}
static int guarded_intact(const guarded* g) { return g != NULL; }
static void guarded_free(guarded* g) { free(g->base); }
#else
static guarded guarded_make(size_t bytes, int64_t placement, int fill) {
  size_t slack = placement > 0 ? (size_t)placement : 0;
  guarded g = {.bytes = bytes, .mapped = (bytes + slack + page() - 1) / page() * page()};
  if (g.mapped == 0) g.mapped = page();
  unsigned char* all = mmap(NULL, g.mapped + 2 * page(), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  check(all != MAP_FAILED, "no memory");
  g.base = all + page();
  check(mprotect(g.base, g.mapped, PROT_READ | PROT_WRITE) == 0, "mprotect");
  memset(g.base, PATTERN, g.mapped);
  g.data = placement < 0 ? g.base : g.base + g.mapped - slack - bytes;
  memset(g.data, fill, bytes);
  return g;
}

static int guarded_intact(const guarded* g) {
  for (const unsigned char* p = g->base; p < g->base + g->mapped; p++)
    if ((p < g->data || p >= g->data + g->bytes) && *p != PATTERN) return 0;
  return 1;
}

static void guarded_free(guarded* g) { munmap(g->base - page(), g->mapped + 2 * page()); }
#endif

/* Scratch memory of the kernels: poisoned with NaN, ending at a guard page; the chosen allocation fails. */
static atomic_llong allocations, outstanding;
static int64_t fail_at;

#ifdef EDGEKIT_CUSTOM_ALLOCATOR
typedef struct {
  void* data;
  guarded memory;
} allocation;
static pthread_mutex_t registry_lock = PTHREAD_MUTEX_INITIALIZER;
static allocation* registry;
static size_t registry_count, registry_room;

void* edgekit_alloc(size_t bytes);
void edgekit_free(void* memory);

void* edgekit_alloc(size_t bytes) {
  if (atomic_fetch_add(&allocations, 1) + 1 == fail_at) return NULL;
  check(bytes % 64 == 0, "edgekit_alloc: not a multiple of 64");
  guarded g = guarded_make(bytes, 0, 0xFF);
  pthread_mutex_lock(&registry_lock);
  if (registry_count == registry_room) {
    registry_room = 2 * registry_room + 16;
    registry = realloc(registry, registry_room * sizeof registry[0]);
    check(registry != NULL, "no memory");
  }
  registry[registry_count++] = (allocation){g.data, g};
  pthread_mutex_unlock(&registry_lock);
  atomic_fetch_add(&outstanding, 1);
  return g.data;
}

void edgekit_free(void* memory) {
  pthread_mutex_lock(&registry_lock);
  size_t i = 0;
  while (i < registry_count && registry[i].data != memory) i++;
  check(i < registry_count, "edgekit_free: unknown pointer");
  check(guarded_intact(&registry[i].memory), "a kernel wrote in front of its scratch memory");
  guarded_free(&registry[i].memory);
  registry[i] = registry[--registry_count];
  pthread_mutex_unlock(&registry_lock);
  atomic_fetch_sub(&outstanding, 1);
}
#endif

/* Threads of the caller: made for each loop, taking tasks in turn. */
typedef struct {
  void (*task)(void*, int64_t);
  void* data;
  int64_t n;
  atomic_llong next;
} loop;

static void* worker(void* argument) {
  loop* l = argument;
  for (int64_t i; (i = atomic_fetch_add(&l->next, 1)) < l->n;) l->task(l->data, i);
  return NULL;
}

static void parallel_for(void* context, void (*task)(void*, int64_t), void* data, int64_t n) {
  loop l = {.task = task, .data = data, .n = n};
  pthread_t threads[64];
  int count = *(int*)context < 64 ? *(int*)context : 64;
  for (int i = 0; i < count; i++) check(pthread_create(&threads[i], NULL, worker, &l) == 0, "pthread_create");
  for (int i = 0; i < count; i++) pthread_join(threads[i], NULL);
}

static int read_all(void* to, size_t bytes) { return fread(to, 1, bytes, stdin) == bytes; }

static int call(int64_t op, int dtype, const int64_t* i, const double* f, const void* const* t, void* out,
                const edgekit_threads* threads, char* error) {
  if (op == 0) {
    const edgekit_bsa_args args = {dtype, t[0], t[1], t[2], t[3], out,  i[0], i[1],  i[2],        i[3],       i[4],
                                   i[5],  i[6], i[7], i[8], i[9], i[10], i[11], (float)f[0], (float)f[1]};
    return edgekit_block_sparse_attention(&args, threads, error, MESSAGE);
  }
  if (op == 1) {
    const edgekit_kla_args args = {dtype, t[0], t[1], t[2], out, i[0], i[1], i[2], i[3], i[4], i[5], (float)f[0]};
    return edgekit_kernel_linear_attention(&args, threads, error, MESSAGE);
  }
  const edgekit_scan_args args = {dtype, t[0], t[1], t[2], t[3], t[4], t[5], t[6], out, i[0], i[1], i[2], i[3], i[4]};
  return edgekit_selective_scan(&args, threads, error, MESSAGE);
}

int main(void) {
  int64_t head[9];
  while (read_all(head, sizeof head)) {
    const int64_t op = head[0], placement = head[3], out_bytes = head[8];
    int thread_count = (int)head[2];
    int64_t ints[MOST] = {0};
    double floats[MOST] = {0};
    guarded tensors[MOST] = {{0}};
    const void* pointers[MOST] = {NULL};
    check(head[5] <= MOST && head[6] <= MOST && head[7] <= MOST, "a malformed case");
    check(read_all(ints, (size_t)head[5] * sizeof ints[0]), "a short case");
    check(read_all(floats, (size_t)head[6] * sizeof floats[0]), "a short case");
    for (int64_t i = 0; i < head[7]; i++) {
      int64_t bytes;
      check(read_all(&bytes, sizeof bytes), "a short case");
      if (bytes < 0) continue;
      tensors[i] = guarded_make((size_t)bytes, placement, 0);
      check(read_all(tensors[i].data, (size_t)bytes), "a short case");
      pointers[i] = tensors[i].data;
    }
    guarded out = guarded_make(out_bytes > 0 ? (size_t)out_bytes : 0, placement, 0xFF);
    atomic_store(&allocations, 0);
    fail_at = head[4];

    const edgekit_threads threads = {parallel_for, &thread_count, thread_count};
    char error[MESSAGE];
    memset(error, 0x7E, sizeof error);
    int64_t code = call(op, (int)head[1], ints, floats, pointers, out_bytes < 0 ? NULL : out.data,
                        thread_count > 0 ? &threads : NULL, error);
    check(memchr(error, 0, sizeof error) != NULL, "a message without an end");
    check(atomic_load(&outstanding) == 0, "scratch memory was not given back");
    for (int64_t i = 0; i < head[7]; i++)
      if (pointers[i] != NULL && !guarded_intact(&tensors[i])) code = WROTE_OUTSIDE;
    if (!guarded_intact(&out)) code = WROTE_OUTSIDE;

    fwrite(&code, sizeof code, 1, stdout);
    fwrite(error, sizeof error, 1, stdout);
    if (out_bytes > 0) fwrite(out.data, (size_t)out_bytes, 1, stdout);
    fflush(stdout);
    for (int64_t i = 0; i < head[7]; i++)
      if (pointers[i] != NULL) guarded_free(&tensors[i]);
    guarded_free(&out);
  }
  return 0;
}
