/* Inner products of int8 rows with float vectors by the multiplication of 8-bit integers (AVX-512 VNNI: 64 products an
 * instruction, where converted codes take 16).
 *
 * Over COLUMNS columns a vector is its largest magnitude times integers v of 24 bits, as exact as float32 is for the
 * largest of them; v = (a << 16) + (b << 8) + c with digits of 8 bits. Sums of a code with a digit are exact in 32 bits,
 * those of a code with v in 64, so that the order of the columns does not matter; chunks of columns are added as doubles.
 * The instruction takes one factor without a sign: it is given code + 128, and 128 times the sum of the digits is
 * subtracted afterwards. */
#include <math.h>
#include <stdlib.h>

#include "scan_call.h"

#define DIGITS 3
#define LARGEST 8355711 /* (127 << 16) + (127 << 8) + 127 */
#define LINE 64

#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx512vnni,avx2,fma,prefer-vector-width=512")))
#define ROWS 4
#define BLOCK_ROWS 32 /* rows whose chunk of columns stays in the second-level cache while the vectors pass */
#define GROUP 64      /* vectors that pass */
int sdi_scan_int8_serves(void) { return __builtin_cpu_supports("avx512vnni") != 0; }

/* Sums of the lanes of four registers. */
TARGET static inline __m128i sums_of(__m512i a, __m512i b, __m512i c, __m512i d) {
  __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  __m512i four = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(four), _mm512_extracti64x4_epi64(four, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

/* Compilers keep arrays of registers in memory, so that sums have names: j is a digit, 0 to 5, of two vectors. */
#define SUMS(j) \
  __m512i a##j = _mm512_setzero_si512(), b##j = a##j, c##j = a##j, d##j = a##j;
/* Not _mm512_dpbusd_epi32: gcc keeps two copies of a sum, one of its type and one of what the intrinsic casts it to,
 * for which there are not enough registers. */
#define ADD_PRODUCTS(sum, x, y) __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(y))
#define MULTIPLY(j)                                              \
  if (j < vectors * DIGITS) {                                    \
    const __m512i y = _mm512_loadu_si512(with + j * width + at); \
    ADD_PRODUCTS(a##j, x0, y);                                   \
    ADD_PRODUCTS(b##j, x1, y);                                   \
    ADD_PRODUCTS(c##j, x2, y);                                   \
    ADD_PRODUCTS(d##j, x3, y);                                   \
  }
#define LINE_OF(row) _mm512_xor_si512(_mm512_maskz_loadu_epi8(there, rows[row] + at), sign)

/* Three digits' sums of four rows, put together and added. */
TARGET static inline void add(const struct digits *digits, int64_t chunk, int64_t vector, __m128i high, __m128i middle,
                              __m128i low, double *total) {
  const int32_t *offset = digits->offset + vector * DIGITS * digits->chunks + chunk;
  const __m128i sums[DIGITS] = {high, middle, low};
  __m256i whole = _mm256_setzero_si256();
  for (int j = 0; j < DIGITS; j++) {
    __m128i sum = _mm_sub_epi32(sums[j], _mm_set1_epi32(offset[j * digits->chunks]));
    whole = _mm256_add_epi64(_mm256_slli_epi64(whole, 8), _mm256_cvtepi32_epi64(sum));
  }
  double each[ROWS], scale = digits->scales[vector * digits->chunks + chunk];
  _mm256_storeu_pd(each, _mm256_cvtepi64_pd(whole));
  for (int r = 0; r < ROWS; r++) total[r * GROUP] += each[r] * scale;
}

/* One chunk of columns of four rows, times `vectors` vectors from `vector` on, added to `total` (row, GROUP). */
TARGET static inline __attribute__((always_inline)) void tile(const struct scan *s, const struct digits *digits,
                                                             const int8_t *const rows[ROWS], int64_t chunk,
                                                             int64_t vector, const int vectors, double *total) {
  const int64_t width = digits->width, columns = s->d - chunk * COLUMNS < COLUMNS ? s->d - chunk * COLUMNS : COLUMNS;
  const int8_t *with = digits->values + vector * DIGITS * width + chunk * COLUMNS;
  const __m512i sign = _mm512_set1_epi8((char)0x80);
  SUMS(0) SUMS(1) SUMS(2) SUMS(3) SUMS(4) SUMS(5)
  for (int64_t at = 0; at < columns; at += LINE) {
    const __mmask64 there = columns - at < LINE ? ((__mmask64)1 << (columns - at)) - 1 : ~(__mmask64)0;
    const __m512i x0 = LINE_OF(0), x1 = LINE_OF(1), x2 = LINE_OF(2), x3 = LINE_OF(3);
    MULTIPLY(0) MULTIPLY(1) MULTIPLY(2) MULTIPLY(3) MULTIPLY(4) MULTIPLY(5)
  }
  add(digits, chunk, vector, sums_of(a0, b0, c0, d0), sums_of(a1, b1, c1, d1), sums_of(a2, b2, c2, d2), total);
  if (vectors == 2)
    add(digits, chunk, vector + 1, sums_of(a3, b3, c3, d3), sums_of(a4, b4, c4, d4), sums_of(a5, b5, c5, d5), total + 1);
}

/* Up to BLOCK_ROWS rows times up to GROUP vectors. */
TARGET static void block(const struct scan *s, const struct digits *digits, int64_t row, int64_t rows, int64_t vector,
                         int64_t vectors) {
  double total[BLOCK_ROWS * GROUP] = {0};
  for (int64_t chunk = 0; chunk < digits->chunks; chunk++) {
    const int8_t *first = (const int8_t *)s->codes + row * s->row_stride + chunk * COLUMNS;
    for (int64_t v = 0; v < vectors; v += 2) {
      for (int64_t r = 0; r < rows; r += ROWS) {
        const int8_t *some[ROWS]; /* beyond the last row: that one again */
        for (int64_t k = 0; k < ROWS; k++)
          some[k] = first + (r + k < rows ? r + k : rows - 1) * s->row_stride;
        if (v + 1 < vectors) tile(s, digits, some, chunk, vector + v, 2, total + r * GROUP + v);
        else tile(s, digits, some, chunk, vector + v, 1, total + r * GROUP + v);
      }
    }
  }
  for (int64_t r = 0; r < rows; r++) {
    double scale = s->scales ? s->scales[row + r] : 1;
    float *out = s->out + (row + r) * s->count + vector;
    for (int64_t v = 0; v < vectors; v++) out[v] = (float)(total[r * GROUP + v] * scale);
  }
}

void sdi_scan_int8_run(const struct scan *s, const struct digits *digits, int64_t row, int64_t last) {
  for (; row < last; row += BLOCK_ROWS) {
    int64_t rows = last - row < BLOCK_ROWS ? last - row : BLOCK_ROWS;
    for (int64_t vector = 0; vector < s->count; vector += GROUP)
      block(s, digits, row, rows, vector, s->count - vector < GROUP ? s->count - vector : GROUP);
  }
}

/* One chunk of a vector: its digits and scale; 0 where it has none. */
TARGET static int split(const float *from, int64_t columns, int8_t *to[DIGITS], double *scale, int32_t offset[DIGITS]) {
  float largest = 0;
  int finite = 1;
  for (int64_t i = 0; i < columns; i++) {
    float size = fabsf(from[i]);
    finite &= size <= 3.4028234663852886e38f; /* false for NaN, too */
    largest = size > largest ? size : largest;
  }
  if (!finite) return 0;
  const double gain = largest > 0 ? (double)LARGEST / largest : 0;
  int32_t sums[DIGITS] = {0};
  for (int64_t i = 0; i < columns; i++) {
    int32_t value = (int32_t)lrint(from[i] * gain);
    int32_t c = (int8_t)value, rest = (value - c) >> 8; /* a digit may be -128: the one above it is one more */
    int32_t b = (int8_t)rest, a = (rest - b) >> 8;
    to[0][i] = (int8_t)a, to[1][i] = (int8_t)b, to[2][i] = (int8_t)c;
    sums[0] += a, sums[1] += b, sums[2] += c;
  }
  *scale = largest / LARGEST;
  for (int j = 0; j < DIGITS; j++) offset[j] = 128 * sums[j];
  return 1;
}

int sdi_scan_int8_prepare(const struct scan *s, struct digits *digits) {
  const int64_t width = round_up(s->d, LINE), chunks = (s->d + COLUMNS - 1) / COLUMNS, parts = s->count * DIGITS;
  *digits = (struct digits){.width = width, .chunks = chunks};
  digits->values = calloc((size_t)(parts * width), 1); /* behind d: zero */
  digits->scales = malloc((size_t)(s->count * chunks) * sizeof(double));
  digits->offset = malloc((size_t)(parts * chunks) * sizeof(int32_t));
  int done = digits->values && digits->scales && digits->offset;
  for (int64_t v = 0; done && v < s->count; v++) {
    for (int64_t chunk = 0; done && chunk < chunks; chunk++) {
      const int64_t first = chunk * COLUMNS, columns = s->d - first < COLUMNS ? s->d - first : COLUMNS;
      int8_t *to[DIGITS];
      int32_t offset[DIGITS];
      for (int j = 0; j < DIGITS; j++) to[j] = digits->values + (v * DIGITS + j) * width + first;
      done = split(s->vectors + v * s->d + first, columns, to, digits->scales + v * chunks + chunk, offset);
      for (int j = 0; done && j < DIGITS; j++) digits->offset[(v * DIGITS + j) * chunks + chunk] = offset[j];
    }
  }
  if (!done) sdi_scan_int8_free(digits);
  return done;
}

void sdi_scan_int8_free(struct digits *digits) {
  free(digits->values);
  free(digits->scales);
  free(digits->offset);
  *digits = (struct digits){0};
}
#else
int sdi_scan_int8_serves(void) { return 0; }
int sdi_scan_int8_prepare(const struct scan *s, struct digits *digits) { return (void)s, (void)digits, 0; }
void sdi_scan_int8_free(struct digits *digits) { (void)digits; }
void sdi_scan_int8_run(const struct scan *s, const struct digits *digits, int64_t row, int64_t last) {
  (void)s, (void)digits, (void)row, (void)last;
}
#endif
