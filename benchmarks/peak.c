/* Measure the peak speed of the machine's arithmetic and memory, all threads together; print one line of JSON.
 *
 *   cc -O3 -march=native -pthread benchmarks/peak.c -o peak && ./peak THREADS
 *
 * Operations are multiplications and additions. Every loop has enough independent accumulators to hide latency. Its
 * instructions are volatile, because the compiler would otherwise find that their operands never change, and remove
 * them. Bandwidth is measured on memory that is too large for any cache.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define SECONDS 0.12
#define BYTES ((size_t)192 << 20) /* per thread */

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Runs `steps` iterations; returns operations (or bytes) done. */
typedef double (*Loop)(long steps, const char *memory);

#if defined(__AVX2__)
#define TEN(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9)
#define DECLARE(i) __m256i a##i = _mm256_setzero_si256();
#define KEEP(i) __asm__ volatile("" ::"x"(a##i));

static double fma_f32(long steps, const char *memory) {
  (void)memory;
  const __m256i x = _mm256_setzero_si256();
  TEN(DECLARE)
  for (long s = 0; s < steps; ++s) {
#define STEP(i) __asm__ volatile("vfmadd231ps %1, %1, %0" : "+x"(a##i) : "x"(x));
    TEN(STEP)
#undef STEP
  }
  TEN(KEEP)
  return (double)steps * 10 * 8 * 2;
}

/* Multiply unsigned by signed bytes, add pairs to 16-bit sums, add pairs of these to 32-bit sums, and accumulate. */
static double int8_maddubs(long steps, const char *memory) {
  (void)memory;
  const __m256i x = _mm256_set1_epi8(1), ones = _mm256_set1_epi16(1);
  TEN(DECLARE)
  for (long s = 0; s < steps; ++s) {
#define STEP(i)                                                                              \
  {                                                                                          \
    __m256i t;                                                                               \
    __asm__ volatile("vpmaddubsw %2, %2, %1\n\tvpmaddwd %3, %1, %1\n\tvpaddd %1, %0, %0"     \
                     : "+x"(a##i), "=&x"(t)                                                  \
                     : "x"(x), "x"(ones));                                                   \
  }
    TEN(STEP)
#undef STEP
  }
  TEN(KEEP)
  return (double)steps * 10 * 32 * 2;
}

/* Multiply bytes that are already widened to 16 bits, add pairs to 32 bits, and accumulate. */
static double int8_madd(long steps, const char *memory) {
  (void)memory;
  const __m256i x = _mm256_set1_epi16(1);
  TEN(DECLARE)
  for (long s = 0; s < steps; ++s) {
#define STEP(i)                                                                                          \
  {                                                                                                      \
    __m256i t;                                                                                           \
    __asm__ volatile("vpmaddwd %2, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(a##i), "=&x"(t) : "x"(x));        \
  }
    TEN(STEP)
#undef STEP
  }
  TEN(KEEP)
  return (double)steps * 10 * 16 * 2;
}
#endif

#if defined(__AVX512VNNI__) && defined(__AVX512F__)
static double int8_vnni(long steps, const char *memory) {
  (void)memory;
  const __m512i x = _mm512_set1_epi8(1);
#define DECLARE512(i) __m512i a##i = _mm512_setzero_si512();
  TEN(DECLARE512)
  for (long s = 0; s < steps; ++s) {
#define STEP(i) __asm__ volatile("vpdpbusd %1, %1, %0" : "+v"(a##i) : "v"(x));
    TEN(STEP)
#undef STEP
  }
#define KEEP512(i) __asm__ volatile("" ::"v"(a##i));
  TEN(KEEP512)
  return (double)steps * 10 * 64 * 2;
}
#elif defined(__AVXVNNI__)
static double int8_vnni(long steps, const char *memory) {
  (void)memory;
  const __m256i x = _mm256_set1_epi8(1);
  TEN(DECLARE)
  for (long s = 0; s < steps; ++s) {
#define STEP(i) __asm__ volatile("%{vex%} vpdpbusd %1, %1, %0" : "+x"(a##i) : "x"(x));
    TEN(STEP)
#undef STEP
  }
  TEN(KEEP)
  return (double)steps * 10 * 32 * 2;
}
#endif

static double read_memory(long steps, const char *memory) {
  for (long s = 0; s < steps; ++s) {
#if defined(__AVX2__)
    __m256i a = _mm256_setzero_si256(), b = a, c = a, d = a;
    for (size_t i = 0; i < BYTES; i += 128) {
      _mm_prefetch(memory + i + 4096, _MM_HINT_T0);
      _mm_prefetch(memory + i + 4160, _MM_HINT_T0);
      a = _mm256_or_si256(a, _mm256_load_si256((const __m256i *)(memory + i)));
      b = _mm256_or_si256(b, _mm256_load_si256((const __m256i *)(memory + i + 32)));
      c = _mm256_or_si256(c, _mm256_load_si256((const __m256i *)(memory + i + 64)));
      d = _mm256_or_si256(d, _mm256_load_si256((const __m256i *)(memory + i + 96)));
    }
    __asm__ volatile("" ::"x"(a), "x"(b), "x"(c), "x"(d));
#else
    uint64_t a = 0;
    for (size_t i = 0; i < BYTES; i += 8) a |= *(const uint64_t *)(memory + i);
    __asm__ volatile("" ::"r"(a));
#endif
  }
  return (double)steps * BYTES;
}

typedef struct {
  Loop loop;
  long first; /* iterations between readings of the clock */
  char *memory;
  pthread_barrier_t *barrier;
  double rate;
} Work;

static void *run(void *argument) {
  Work *work = argument;
  pthread_barrier_wait(work->barrier);
  double done = 0, started = now(), elapsed;
  do {
    done += work->loop(work->first, work->memory);
    elapsed = now() - started;
  } while (elapsed < SECONDS);
  work->rate = done / elapsed;
  return NULL;
}

static double measure(Loop loop, long first, int threads, char **memory) {
  pthread_t ids[256];
  Work works[256];
  pthread_barrier_t barrier;
  double best = 0;
  for (int attempt = 0; attempt < 3; ++attempt) {
    double sum = 0;
    pthread_barrier_init(&barrier, NULL, (unsigned)threads);
    for (int i = 0; i < threads; ++i) {
      works[i] = (Work){loop, first, memory[i], &barrier, 0};
      if (pthread_create(&ids[i], NULL, run, &works[i])) exit(1);
    }
    for (int i = 0; i < threads; ++i) {
      pthread_join(ids[i], NULL);
      sum += works[i].rate;
    }
    pthread_barrier_destroy(&barrier);
    if (sum > best) best = sum;
  }
  return best;
}

int main(int count, char **arguments) {
  int threads = count > 1 ? atoi(arguments[1]) : 1;
  char *memory[256];
  if (threads < 1 || threads > 256) return 2;
  for (int i = 0; i < threads; ++i) {
    memory[i] = aligned_alloc(4096, BYTES + 8192);
    if (!memory[i]) return 1;
    memset(memory[i], 1, BYTES + 8192);
  }
  printf("{\"read_bytes_per_s\": %.4g", measure(read_memory, 1, threads, memory));
#if defined(__AVX2__)
  printf(", \"f32_fma\": %.4g", measure(fma_f32, 200000, threads, memory));
  printf(", \"int8_maddubs\": %.4g", measure(int8_maddubs, 200000, threads, memory));
  printf(", \"int8_madd\": %.4g", measure(int8_madd, 200000, threads, memory));
#endif
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
  printf(", \"int8_vnni\": %.4g", measure(int8_vnni, 200000, threads, memory));
#endif
  printf("}\n");
  return 0;
}
