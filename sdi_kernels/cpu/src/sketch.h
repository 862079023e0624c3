/* Types shared by the instruction-set variants (simd.h) and the driver (sketch.c). */
#ifndef SDI_SKETCH_H
#define SDI_SKETCH_H

#include <stddef.h>
#include <stdint.h>

#define MAX_PASSES 8
#define FFT_UNIT 32  /* tokens whose spectra are summed before they join the row's total */
#define ROWS_UNIT 16  /* rows of a matrix whose sum joins the total: as many as give so many additions to a bucket */
#define MATRICES 4    /* whole matrices that are sketched side by side */
#define DIRECT_ROWS 512  /* output features of one unit of the direct route */
#define DIRECT_DEPTH 256  /* most tokens of one unit of the direct route */
#define DIRECT_PANELS (128 * 1024)  /* floats of packed panels: half a mebibyte, so they stay in the L2 cache */

enum dtype { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };
enum route { DIRECT = 0, FFT = 1 };

/* A caller's (rows, tokens, features) array and its half of the hash tables; strides in elements, features dense. */
struct side {
  const void *data;
  int64_t row_stride, token_stride, d;
  const int32_t *bucket;
  const int8_t *sign;
  const int32_t *sources; /* (m, sources_each): the inverse table, +-(feature + 1) or 0 */
  int32_t sources_each, dtype;
};

/* One call, as ctypes fills it in (sdi_kernels/cpu/native.py: keep the two in step). */
struct call {
  float *out;
  int64_t out_stride, rows, tokens, m;
  struct side grads, acts; /* output side and input side of the layer */
  const float *center, *scale; /* scaled vectors: (rows, tokens) each, or NULL for 0 and 1 */
  const float *metric;         /* direct: (d_out, d_in) with dense columns, multiplied into every row's G; or NULL */
  int64_t metric_stride;       /* between rows of the metric */
  int32_t route, threads;
  int64_t budget; /* bytes of scratch the call may use */
  void *parallel; /* GOMP_parallel of the OpenMP runtime that torch runs on, or NULL */
};

/* A side as the kernels see it. The CountSketch is worked off in layers: layer k holds the k-th source of every bucket,
 * buckets in rising order. The first layer is stored, the others are added, and no layer visits a bucket twice: so
 * nothing has to be cleared between tokens, and no addition waits for the one before it. */
struct view {
  struct side s;
  float *sign;
  int contiguous; /* bucket[i] == i */
  int64_t stored; /* entries of the first layer */
  int32_t *from, *to;
};

struct fft_plan {
  int64_t m, columns; /* columns = m / lanes: vectors per transform */
  int passes, radix[MAX_PASSES];
  const float *pass_twiddle[MAX_PASSES]; /* [j][q - 1][re, im] */
  const float *lane_twiddle;             /* [column][re, im][lane] */
};

/* One call, prepared. A unit is a share of one row that is always summed on its own, whoever runs it: so the result
 * does not depend on the number of threads. `partial` floats hold a unit's sum. */
struct job {
  const struct call *call;
  struct view grads, acts;
  const struct fft_plan *plan;
  int64_t width, height;     /* direct: columns and rows of G after sides longer than m are folded (with a metric: none
                              * is, since entries that share a bucket are multiplied by different numbers) */
  int64_t depth, row_chunks; /* direct: tokens per unit, and units side by side over `height` */
  int64_t panels_g, panels_a; /* direct: floats of the packed panels */
  const float *ones;          /* direct: signs of a folded side; m of them */
  int64_t units, partial, scratch;
  int64_t workers; /* that go through the rows in order, each with a whole row at a time; 0: another order */
};

struct variant {
  const char *name;
  int lanes, tile_rows, tile_columns;
  void (*unit)(const struct job *, int64_t row, int64_t unit, float *partial, float *scratch);
  void (*finish)(const struct job *, int64_t row, const float *total, float *scratch);
  void (*add)(float *total, const float *partial, int64_t count);
  void (*vector)(const struct job *, int64_t row, float *scratch);
  void (*rows)(const struct job *, int64_t row, float *scratch);
  void (*matrices)(const struct job *, int64_t group, float *scratch);
};

static inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

#endif
