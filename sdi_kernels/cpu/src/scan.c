/* Inner products of stored rows (float32, float16, bfloat16, or int8 with scales) with a few vectors: the scan of a
 * feature store, meant to run at the speed at which memory is read. Called through ctypes
 * (sdi_kernels/cpu/scan.py: keep the two in step). */
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "scan_call.h"

#define EXPORT __attribute__((visibility("default")))
#define TASK_BYTES (1 << 18) /* codes that a worker takes at a time */
#define TILE_BYTES (1 << 14) /* codes that all vectors are multiplied with before the next are read */
#define AHEAD 8192           /* bytes that are asked for in advance, at least */
#define MAX_THREADS 256
#define MANY 16 /* vectors from which on int8 codes are multiplied as integers: with fewer, taking a sum's parts together
                * costs what is saved */
#ifdef __clang__
#define SCAN_UNROLL _Pragma("clang loop unroll(full)")
#else
#define SCAN_UNROLL _Pragma("GCC unroll 16")
#endif

const char *sdi_variant(void);

#define LANES 4
#define ROWS 4
#define VECTORS 2
#define TARGET
#define NAME(x) baseline_##x
#include "scan.h"

#if defined(__x86_64__)
#define LANES 8
#define ROWS 4
#define VECTORS 2
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define NAME(x) avx2_##x
#define FROM_INT8(p) _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(p))))
#define FROM_UINT16(p) _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p)))
#define FROM_FLOAT16(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p)))
#include "scan.h"

#define LANES 16
#define ROWS 4
#define VECTORS 4
#define TARGET __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,prefer-vector-width=512")))
#define NAME(x) avx512_##x
#define FROM_INT8(p) _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(p))))
#define FROM_UINT16(p) _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(p)))
#define FROM_FLOAT16(p) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p)))
#include "scan.h"
#endif

typedef void (*kernel)(const struct scan *, int64_t row, int64_t last);

static kernel find(void) {
#if defined(__x86_64__)
  const char *name = sdi_variant();
  if (strcmp(name, "avx512") == 0) return avx512_run;
  if (strcmp(name, "avx2") == 0 && __builtin_cpu_supports("f16c")) return avx2_run;
#endif
  return baseline_run;
}

/* Whether codes are multiplied as integers: many vectors, and no narrower instruction set was asked for. */
static int by_integers(const struct scan *scan, kernel chosen) {
#if defined(__x86_64__)
  return scan->dtype == INT8 && scan->count >= MANY && chosen == avx512_run && sdi_scan_int8_serves();
#else
  return (void)scan, (void)chosen, 0;
#endif
}

struct share {
  const struct scan *scan;
  const struct digits *digits; /* of int8 codes where the machine multiplies integers, else NULL */
  kernel kernel;
  int64_t rows_each, tile;
  atomic_llong next;
};

static void work(void *argument) {
  struct share *share = argument;
  int64_t rows = share->scan->rows;
  for (int64_t row; (row = atomic_fetch_add(&share->next, share->rows_each)) < rows;) {
    int64_t last = rows - row < share->rows_each ? rows : row + share->rows_each;
    if (share->digits) sdi_scan_int8_run(share->scan, share->digits, row, last);
    else for (; row < last; row += share->tile)
      share->kernel(share->scan, row, last - row < share->tile ? last : row + share->tile);
  }
}

static void *work_thread(void *argument) {
  work(argument);
  return NULL;
}

EXPORT int64_t sdi_scan_bytes(void) { return sizeof(struct scan); }

/* out[r, c] = scales[r] * sum_i codes[r, i] * vectors[c, i] */
EXPORT void sdi_scan(const struct scan *scan) {
  int64_t size = scan->dtype == INT8 ? 1 : scan->dtype == FLOAT32 ? 4 : 2;
  int64_t row_bytes = scan->d * size > 0 ? scan->d * size : 1;
  struct share share = {.scan = scan, .kernel = find()};
  struct digits digits = {0};
  if (by_integers(scan, share.kernel) && sdi_scan_int8_prepare(scan, &digits)) share.digits = &digits;
  /* Whole numbers of row blocks, so that only the last rows of a call go one by one. */
  share.tile = round_up(TILE_BYTES / row_bytes + 1, 4);
  share.rows_each = round_up(TASK_BYTES / row_bytes + 1, share.tile);
  atomic_init(&share.next, 0);
  int64_t tasks = (scan->rows + share.rows_each - 1) / share.rows_each;
  int threads = scan->threads < MAX_THREADS ? scan->threads : MAX_THREADS;
  if (threads > tasks) threads = (int)tasks;
  if (threads <= 1) {
    work(&share);
  } else if (scan->parallel) {
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
    memcpy(&parallel, &scan->parallel, sizeof(parallel));
    parallel(work, &share, (unsigned)threads, 0);
  } else {
    pthread_t started[MAX_THREADS];
    int count = 0;
    while (count < threads - 1 && pthread_create(&started[count], NULL, work_thread, &share) == 0) count++;
    work(&share);
    while (count > 0) pthread_join(started[--count], NULL);
  }
  sdi_scan_int8_free(&digits);
}
