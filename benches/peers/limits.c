// Limits of the machine: read bandwidth, and peak rates of arithmetic that touches no memory, for one
// thread and for all. Needs AVX-512 with BF16 and VNNI.
//
//     cc -O2 -march=native -pthread limits.c -o limits && ./limits [THREADS] [BUFFER_GIB]
//
// Prints a JSON line a limit: {"limit", "threads", "unit", "median", "best"}.
#define _GNU_SOURCE
#include <immintrin.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

enum { REPEATS = 7, MAX_THREADS = 64 };
enum kind { ONE_STREAM, FOUR_STREAMS, FOUR_STREAMS_PREFETCHED, F32, BF16, INT8 };

struct task {
  const char *bytes;
  size_t n_bytes;
  enum kind kind;
  long n_loops;
  volatile int sink;
  pthread_barrier_t *start;
  double begun, ended;
};

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + t.tv_nsec * 1e-9;
}

// ---- memory: every cache line is loaded once, as one stream or as four

static int read_all(const char *p, size_t n_bytes, enum kind kind) {
  __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a;
  // Four streams are a quarter of the bytes apart, one stream has four lines in a row.
  size_t apart = kind == ONE_STREAM ? 64 : n_bytes / 4, step = kind == ONE_STREAM ? 256 : 64;
  size_t end = kind == ONE_STREAM ? n_bytes : n_bytes / 4;
  for (size_t i = 0; i < end; i += step) {
    if (kind == FOUR_STREAMS_PREFETCHED)
      for (int k = 0; k < 4; k++) _mm_prefetch(p + k * apart + i + 2048, _MM_HINT_T0);
    a = _mm512_xor_si512(a, _mm512_load_si512(p + i));
    b = _mm512_xor_si512(b, _mm512_load_si512(p + apart + i));
    c = _mm512_xor_si512(c, _mm512_load_si512(p + 2 * apart + i));
    d = _mm512_xor_si512(d, _mm512_load_si512(p + 3 * apart + i));
  }
  a = _mm512_xor_si512(_mm512_xor_si512(a, b), _mm512_xor_si512(c, d));
  return _mm512_reduce_add_epi32(a);
}

// ---- arithmetic: 24 independent accumulators, two source registers, 48 instructions a loop

#define EACH(X)                                                                                  \
  X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14) X(15) X(16)    \
  X(17) X(18) X(19) X(20) X(21) X(22) X(23)
#define CLEAR(n) "vpxord %%zmm" #n ",%%zmm" #n ",%%zmm" #n "\n\t"
#define F32_FMA(n) "vfmadd231ps %%zmm30,%%zmm31,%%zmm" #n "\n\t"
#define BF16_DOT(n) "vdpbf16ps %%zmm30,%%zmm31,%%zmm" #n "\n\t"
#define INT8_DOT(n) "vpdpbusd %%zmm30,%%zmm31,%%zmm" #n "\n\t"
#define LOOP(NAME, INSTRUCTION)                                                                  \
  static void NAME(long n_loops, const void *operands) {                                         \
    __asm__ volatile(EACH(CLEAR) "vmovups (%1),%%zmm30\n\tvmovups 64(%1),%%zmm31\n\t1:\n\t"       \
                     EACH(INSTRUCTION) EACH(INSTRUCTION) "dec %0\n\tjnz 1b\n\t"                  \
                     : "+r"(n_loops) : "r"(operands)                                             \
                     : "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6",   \
                       "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14",      \
                       "xmm15", "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22",   \
                       "xmm23", "xmm30", "xmm31");                                               \
  }
LOOP(f32_loop, F32_FMA)
LOOP(bf16_loop, BF16_DOT)
LOOP(int8_loop, INT8_DOT)

static unsigned char operands[128] __attribute__((aligned(64)));

// Values that are neither zero nor grow without bound within a run.
static void fill_operands(enum kind kind) {
  for (int i = 0; i < 128; i++) operands[i] = i % 5;
  for (int i = 0; kind == F32 && i < 32; i++) ((float *)operands)[i] = 1.0f + 1e-3f * i;
  for (int i = 0; kind == BF16 && i < 64; i++) ((unsigned short *)operands)[i] = 0x3f80 + i % 7;
}

// ---- running

static void *body(void *argument) {
  struct task *task = argument;
  pthread_barrier_wait(task->start);
  task->begun = now();
  switch (task->kind) {
    case F32: f32_loop(task->n_loops, operands); break;
    case BF16: bf16_loop(task->n_loops, operands); break;
    case INT8: int8_loop(task->n_loops, operands); break;
    default: task->sink = read_all(task->bytes, task->n_bytes, task->kind);
  }
  task->ended = now();
  return NULL;
}

// Seconds from the first start to the last end.
static double run(int n_threads, enum kind kind, const char *bytes, size_t n_bytes, long n_loops) {
  pthread_t threads[MAX_THREADS];
  struct task tasks[MAX_THREADS];
  pthread_barrier_t start;
  pthread_barrier_init(&start, NULL, n_threads);
  size_t share = n_bytes / n_threads / 4096 * 4096;
  for (int i = 0; i < n_threads; i++) {
    tasks[i] = (struct task){bytes + i * share, share, kind, n_loops, 0, &start, 0, 0};
    pthread_create(&threads[i], NULL, body, &tasks[i]);
  }
  double begun = 1e99, ended = 0;
  for (int i = 0; i < n_threads; i++) {
    pthread_join(threads[i], NULL);
    begun = tasks[i].begun < begun ? tasks[i].begun : begun;
    ended = tasks[i].ended > ended ? tasks[i].ended : ended;
  }
  return ended - begun;
}

static int ascending(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

static void report(const char *name, const char *unit, int n_threads, enum kind kind,
                   const char *bytes, size_t n_bytes, long n_loops, double amount) {
  double seconds[REPEATS];
  for (int i = 0; i < REPEATS; i++) seconds[i] = run(n_threads, kind, bytes, n_bytes, n_loops);
  qsort(seconds, REPEATS, sizeof *seconds, ascending);
  printf("{\"limit\":\"%s\",\"threads\":%d,\"unit\":\"%s\",\"median\":%.1f,\"best\":%.1f}\n", name,
         n_threads, unit, amount / seconds[REPEATS / 2] / 1e9, amount / seconds[0] / 1e9);
  fflush(stdout);
}

int main(int argc, char **argv) {
  int n_threads = argc > 1 ? atoi(argv[1]) : 2;
  size_t n_bytes = (size_t)((argc > 2 ? atof(argv[2]) : 1.0) * (1u << 30)) / 4096 * 4096;
  if (n_threads < 1 || n_threads > MAX_THREADS) return 2;
  char *bytes = mmap(NULL, n_bytes + (1 << 21), PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (bytes == MAP_FAILED) return 2;
  madvise(bytes, n_bytes, MADV_HUGEPAGE);
  memset(bytes, 1, n_bytes);
  const char *reads[] = {"read_1_stream", "read_4_streams", "read_4_streams_prefetched"};
  for (enum kind kind = ONE_STREAM; kind <= FOUR_STREAMS_PREFETCHED; kind++)
    report(reads[kind], "GB/s", n_threads, kind, bytes, n_bytes, 0, n_bytes);
  const char *rates[] = {"f32", "bf16", "int8"};
  for (enum kind kind = F32; kind <= INT8; kind++) {
    fill_operands(kind);
    long n_loops = 2000000;
    double operations = (double)n_loops * 48 * (32 << (kind - F32)) * n_threads;
    report(rates[kind - F32], "GOP/s", n_threads, kind, bytes, n_bytes, n_loops, operations);
  }
}
