/* The kernels, for one vector width. Included by one .c file per instruction set, which defines
 *   LANES       floats per vector: 4, 8 or 16
 *   TILE_ROWS, TILE_VECTORS   accumulator tile of the direct route, sized to the register file
 *   VARIANT     name of the exported table
 * and sets the target. Written in GCC vector extensions (GCC and clang, any architecture).
 */
#include <math.h>
#include <string.h>

#include "sketch.h"

#define INLINE static inline __attribute__((always_inline))
#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif
#define TILE_COLUMNS (TILE_VECTORS * LANES)

typedef float V __attribute__((vector_size(LANES * 4), may_alias));
typedef float VU __attribute__((vector_size(LANES * 4), may_alias, aligned(4)));
typedef int32_t VI __attribute__((vector_size(LANES * 4)));

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (VI){__VA_ARGS__})
#endif

/* In-128-bit-lane interleaves, and the even and odd 128-bit lanes of a pair: one cheap instruction each on x86. */
#if LANES == 16
#define LOW1(a, b) SHUFFLE(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29)
#define HIGH1(a, b) SHUFFLE(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31)
#define LOW2(a, b) SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
#define HIGH2(a, b) SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31)
#define EVEN4(a, b) SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27)
#define ODD4(a, b) SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31)
#elif LANES == 8
#define LOW1(a, b) SHUFFLE(a, b, 0, 8, 1, 9, 4, 12, 5, 13)
#define HIGH1(a, b) SHUFFLE(a, b, 2, 10, 3, 11, 6, 14, 7, 15)
#define LOW2(a, b) SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13)
#define HIGH2(a, b) SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15)
#define EVEN4(a, b) SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11)
#define ODD4(a, b) SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15)
#else
#define LOW1(a, b) SHUFFLE(a, b, 0, 4, 1, 5)
#define HIGH1(a, b) SHUFFLE(a, b, 2, 6, 3, 7)
#define LOW2(a, b) SHUFFLE(a, b, 0, 1, 4, 5)
#define HIGH2(a, b) SHUFFLE(a, b, 2, 3, 6, 7)
#endif

INLINE void transpose(V *x) {
  V u[LANES / 4][4];
  UNROLL for (int g = 0; g < LANES / 4; g++) {
    V a = LOW1(x[4 * g], x[4 * g + 1]), b = HIGH1(x[4 * g], x[4 * g + 1]);
    V c = LOW1(x[4 * g + 2], x[4 * g + 3]), d = HIGH1(x[4 * g + 2], x[4 * g + 3]);
    u[g][0] = LOW2(a, c), u[g][1] = HIGH2(a, c), u[g][2] = LOW2(b, d), u[g][3] = HIGH2(b, d);
  }
  UNROLL for (int c = 0; c < 4; c++) {
#if LANES == 16
    V p = EVEN4(u[0][c], u[1][c]), q = ODD4(u[0][c], u[1][c]);
    V r = EVEN4(u[2][c], u[3][c]), s = ODD4(u[2][c], u[3][c]);
    x[c] = EVEN4(p, r), x[8 + c] = ODD4(p, r), x[4 + c] = EVEN4(q, s), x[12 + c] = ODD4(q, s);
#elif LANES == 8
    x[c] = EVEN4(u[0][c], u[1][c]), x[4 + c] = ODD4(u[0][c], u[1][c]);
#else
    x[c] = u[0][c];
#endif
  }
}

/* ------------------------------------------------------------------------------------------------------------
 * Transforms across vectors: forward (exp(-i ...)), every lane on its own, in place, natural order. */

INLINE void multiply(V *re, V *im, V wr, V wi) {
  V r = *re * wr - *im * wi;
  *im = *re * wi + *im * wr;
  *re = r;
}

/* times exp(-2 pi i / 16) ^ power */
INLINE void rotate16(V *re, V *im, int power) {
  const float half = 0.70710678118654752f, c = 0.92387953251128676f, s = 0.38268343236508977f;
  V r = *re, i = *im, zero = {};
  switch (power) {
    case 0: return;
    case 1: multiply(re, im, zero + c, zero - s); return;
    case 2: *re = half * (r + i), *im = half * (i - r); return;
    case 3: multiply(re, im, zero + s, zero - c); return;
    case 4: *re = i, *im = -r; return;
    case 6: *re = half * (i - r), *im = -half * (r + i); return;
    default: multiply(re, im, zero - c, zero + s); return; /* 9 */
  }
}

INLINE void dft2(V *r0, V *i0, V *r1, V *i1) {
  V r = *r0 - *r1, i = *i0 - *i1;
  *r0 += *r1, *i0 += *i1;
  *r1 = r, *i1 = i;
}

INLINE void dft4(V *r, V *i, int s) { /* elements 0, s, 2s, 3s */
  V ar = r[0] + r[2 * s], ai = i[0] + i[2 * s], br = r[0] - r[2 * s], bi = i[0] - i[2 * s];
  V cr = r[s] + r[3 * s], ci = i[s] + i[3 * s], dr = r[s] - r[3 * s], di = i[s] - i[3 * s];
  r[0] = ar + cr, i[0] = ai + ci, r[2 * s] = ar - cr, i[2 * s] = ai - ci;
  r[s] = br + di, i[s] = bi - dr, r[3 * s] = br - di, i[3 * s] = bi + dr;
}

INLINE void dft8(V *r, V *i) {
  V or[4], oi[4], er[4], ei[4];
  UNROLL for (int k = 0; k < 4; k++) er[k] = r[2 * k], ei[k] = i[2 * k], or[k] = r[2 * k + 1], oi[k] = i[2 * k + 1];
  dft4(er, ei, 1);
  dft4(or, oi, 1);
  UNROLL for (int k = 0; k < 4; k++) {
    rotate16(&or[k], &oi[k], 2 * k);
    r[k] = er[k] + or[k], i[k] = ei[k] + oi[k];
    r[k + 4] = er[k] - or[k], i[k + 4] = ei[k] - oi[k];
  }
}

INLINE void dft16(V *r, V *i) {
  V tr[16], ti[16];
  UNROLL for (int j = 0; j < 4; j++) dft4(r + j, i + j, 4);
  UNROLL for (int q = 0; q < 4; q++) {
    UNROLL for (int j = 0; j < 4; j++) rotate16(&r[4 * q + j], &i[4 * q + j], q * j);
    dft4(r + 4 * q, i + 4 * q, 1);
    UNROLL for (int t = 0; t < 4; t++) tr[q + 4 * t] = r[4 * q + t], ti[q + 4 * t] = i[4 * q + t];
  }
  UNROLL for (int k = 0; k < 16; k++) r[k] = tr[k], i[k] = ti[k];
}

INLINE void dft_lanes(V *r, V *i) {
#if LANES == 16
  dft16(r, i);
#elif LANES == 8
  dft8(r, i);
#else
  dft4(r, i, 1);
#endif
}

/* Complex arrays keep a vector of real parts beside one of imaginary parts: value k has its parts at
 * 2 k - k % LANES and LANES floats further. */
INLINE void pass_radix(const int radix, const int mirrored, const V *x, V *y, int64_t columns, int64_t length,
                       const float *twiddle) {
  int64_t stride = length / radix;
  for (int64_t start = 0; start < columns; start += length) {
    for (int64_t j = 0; j < stride; j++) {
      V r[8], i[8], zero = {};
      const float *w = twiddle + j * 2 * (radix - 1) - 2;
      int64_t at = start + j;
      UNROLL for (int q = 0; q < radix; q++) {
        r[q] = x[2 * (at + q * stride)], i[q] = x[2 * (at + q * stride) + 1];
        if (mirrored && q) multiply(&r[q], &i[q], zero + w[2 * q], zero + w[2 * q + 1]);
      }
      if (radix == 8) dft8(r, i);
      if (radix == 4) dft4(r, i, 1);
      if (radix == 2) dft2(&r[0], &i[0], &r[1], &i[1]);
      UNROLL for (int q = 0; q < radix; q++) {
        if (!mirrored && q) multiply(&r[q], &i[q], zero + w[2 * q], zero + w[2 * q + 1]);
        y[2 * (at + q * stride)] = r[q], y[2 * (at + q * stride) + 1] = i[q];
      }
    }
  }
}

INLINE void pass(const struct fft_plan *plan, int k, const int mirrored, const float *x, float *y, int64_t length) {
  const float *w = plan->pass_twiddle[k];
  if (plan->radix[k] == 8) pass_radix(8, mirrored, (const V *)x, (V *)y, plan->columns, length, w);
  else if (plan->radix[k] == 4) pass_radix(4, mirrored, (const V *)x, (V *)y, plan->columns, length, w);
  else pass_radix(2, mirrored, (const V *)x, (V *)y, plan->columns, length, w);
}

/* sum += fft(x)^2, without the factor 2 of the imaginary part, m complex values, in an order of its own.
 *
 * Index n = LANES * n2 + n1: every lane n1 transforms its own `columns` values n2 (passes, then a last transform of
 * LANES vectors); then LANES x LANES blocks are turned over and transformed once more, which combines the lanes. */
INLINE void transform_and_square(const struct fft_plan *plan, const float *x, float *work, float *sum) {
  int64_t length = plan->columns;
  for (int k = 0; k < plan->passes; k++) {
    pass(plan, k, 0, x, work, length);
    length /= plan->radix[k];
    x = work;
  }
  const V *source = (const V *)x, *w = (const V *)plan->lane_twiddle;
  V *y = (V *)sum;
  for (int64_t b = 0; b < 2 * plan->columns; b += 2 * LANES) {
    V r[LANES], i[LANES];
    UNROLL for (int c = 0; c < LANES; c++) r[c] = source[b + 2 * c], i[c] = source[b + 2 * c + 1];
    dft_lanes(r, i);
    UNROLL for (int c = 0; c < LANES; c++) multiply(&r[c], &i[c], w[b + 2 * c], w[b + 2 * c + 1]);
    transpose(r);
    transpose(i);
    dft_lanes(r, i);
    UNROLL for (int k = 0; k < LANES; k++) {
      y[b + 2 * k] = (y[b + 2 * k] + r[k] * r[k]) - i[k] * i[k];
      y[b + 2 * k + 1] += r[k] * i[k];
    }
  }
}

/* y = fft(conj(x)), where x is what transform_and_square sums up; y in natural order. The Fourier matrix is symmetric,
 * so the transposed steps in reverse order are the same transform, and undo its order of values. */
static void transform_back(const struct fft_plan *plan, const float *x, float *y) {
  const V *source = (const V *)x, *w = (const V *)plan->lane_twiddle;
  V *work = (V *)y;
  for (int64_t b = 0; b < 2 * plan->columns; b += 2 * LANES) {
    V r[LANES], i[LANES];
    UNROLL for (int k = 0; k < LANES; k++) r[k] = source[b + 2 * k], i[k] = -2 * source[b + 2 * k + 1];
    dft_lanes(r, i);
    transpose(r);
    transpose(i);
    UNROLL for (int c = 0; c < LANES; c++) multiply(&r[c], &i[c], w[b + 2 * c], w[b + 2 * c + 1]);
    dft_lanes(r, i);
    UNROLL for (int c = 0; c < LANES; c++) work[b + 2 * c] = r[c], work[b + 2 * c + 1] = i[c];
  }
  int64_t length = LANES;
  for (int k = plan->passes - 1; k >= 0; k--) {
    length *= plan->radix[k];
    pass(plan, k, 1, y, y, length);
  }
}

#include "simd_sides.h"
#include "simd_rows.h"
#include "simd_routes.h"
