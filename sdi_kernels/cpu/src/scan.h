/* Inner products of stored rows with a few vectors, for one instruction set. Included by scan.c once per set, which
 * defines LANES (floats per vector), ROWS and VECTORS (accumulators: ROWS * VECTORS of them), TARGET (the functions'
 * attribute), NAME(x), and where the set has instructions for it FROM_INT8, FROM_UINT16 and FROM_FLOAT16 (LANES codes
 * at a pointer, widened).
 *
 * A row's codes are converted in registers, so that memory is read once, in the width that is stored. The order of a
 * row's sum depends on its length only: equal rows have equal products, wherever they lie.
 */
typedef float NAME(V) __attribute__((vector_size(LANES * 4)));
typedef float NAME(VU) __attribute__((vector_size(LANES * 4), may_alias, aligned(4)));
typedef int32_t NAME(VI) __attribute__((vector_size(LANES * 4)));
typedef uint32_t NAME(VW) __attribute__((vector_size(LANES * 4)));
typedef int8_t NAME(VB) __attribute__((vector_size(LANES), may_alias, aligned(1)));
typedef uint16_t NAME(VH) __attribute__((vector_size(LANES * 2), may_alias, aligned(2)));

/* LANES codes as floats. Compilers do not find the widening instructions by themselves, so sets may name theirs. */
TARGET static inline __attribute__((always_inline)) NAME(V) NAME(load)(const void *codes, int64_t at, const int type) {
  if (type == FLOAT32) return (NAME(V)) * (const NAME(VU) *)((const float *)codes + at);
  if (type == INT8) {
    const int8_t *bytes = (const int8_t *)codes + at;
#ifdef FROM_INT8
    return (NAME(V))FROM_INT8(bytes);
#else
    return __builtin_convertvector(__builtin_convertvector(*(const NAME(VB) *)bytes, NAME(VI)), NAME(V));
#endif
  }
  const uint16_t *halves = (const uint16_t *)codes + at;
#ifdef FROM_FLOAT16
  if (type == FLOAT16) return (NAME(V))FROM_FLOAT16(halves);
#endif
#ifdef FROM_UINT16
  NAME(VW) bits = (NAME(VW))FROM_UINT16(halves);
#else
  NAME(VW) bits = __builtin_convertvector(*(const NAME(VH) *)halves, NAME(VW));
#endif
  if (type == BFLOAT16) return (NAME(V))(bits << 16);
  /* The exponent is rebiased by a multiplication, which also normalises subnormals; infinities and NaN keep theirs. */
  NAME(VW) magnitude = (bits & 0x7fff) << 13, sign = (bits & 0x8000) << 16;
  NAME(VW) finite = (NAME(VW))((NAME(V))magnitude * 0x1p112f), special = (NAME(VW))(magnitude >= 0x0f800000u);
  return (NAME(V))((((magnitude | 0x7f800000u) & special) | (finite & ~special)) | sign);
}

TARGET static inline float NAME(value)(const void *codes, int64_t at, int type) {
  if (type == INT8) return ((const int8_t *)codes)[at];
  if (type == FLOAT32) return ((const float *)codes)[at];
  uint16_t half[LANES] = {((const uint16_t *)codes)[at]};
  return NAME(load)(half, 0, type)[0];
}

/* `rows` rows times `vectors` vectors, both constants where this is inlined. */
TARGET static inline __attribute__((always_inline)) void NAME(tile)(const struct scan *s, int64_t row, int64_t vector,
                                                                   const int rows, const int vectors, const int type) {
  const int64_t size = type == INT8 ? 1 : type == FLOAT32 ? 4 : 2, d = s->d;
  const char *codes = (const char *)s->codes + row * s->row_stride * size;
  const float *with = s->vectors + vector * d;
  float sums[ROWS * VECTORS];
  for (int k = 0; k < rows * vectors; k++) sums[k] = 0;
  /* The hardware follows a few rows at a time badly: ask for the lines of a later block in their order in memory. */
  const int64_t block = rows * s->row_stride * size, step = rows * LANES * size;
  uintptr_t later = (uintptr_t)codes + (block > AHEAD ? block : AHEAD); /* a number: it may lie beyond the rows */
  int64_t at = 0;
  do { /* sums over few columns at a time: the rounding error does not grow with a row's length */
    int64_t stop = d - at < COLUMNS ? d : at + COLUMNS;
    NAME(V) acc[ROWS * VECTORS];
    SCAN_UNROLL for (int k = 0; k < rows * vectors; k++) acc[k] = (NAME(V)){};
    for (; at + LANES <= stop; at += LANES) {
      NAME(V) x[ROWS];
      if (rows == ROWS && vector == 0) {
        SCAN_UNROLL for (int line = 0; line < step; line += 64) __builtin_prefetch((const void *)(later + line));
        later += step;
      }
      SCAN_UNROLL for (int r = 0; r < rows; r++) {
        x[r] = NAME(load)(codes + r * s->row_stride * size, at, type);
      }
      SCAN_UNROLL for (int v = 0; v < vectors; v++) {
        NAME(V) y = (NAME(V)) * (const NAME(VU) *)(with + v * d + at);
        SCAN_UNROLL for (int r = 0; r < rows; r++) acc[r * vectors + v] += x[r] * y;
      }
    }
    for (int k = 0; k < rows * vectors; k++) {
      float lanes[LANES];
      memcpy(lanes, &acc[k], sizeof(lanes));
      SCAN_UNROLL for (int half = LANES / 2; half; half /= 2) {
        SCAN_UNROLL for (int lane = 0; lane < half; lane++) lanes[lane] += lanes[lane + half];
      }
      float sum = lanes[0];
      for (int64_t i = at; i < stop; i++)
        sum += NAME(value)(codes + (k / vectors) * s->row_stride * size, i, type) * with[k % vectors * d + i];
      sums[k] += sum;
    }
    at = stop;
  } while (at < d);
  for (int r = 0; r < rows; r++) {
    float scale = s->scales ? s->scales[row + r] : 1;
    for (int v = 0; v < vectors; v++) s->out[(row + r) * s->count + vector + v] = sums[r * vectors + v] * scale;
  }
}

TARGET static inline __attribute__((always_inline)) void NAME(rows_of)(const struct scan *s, int64_t row, int64_t last,
                                                                      const int vectors, int64_t vector, const int type) {
  for (; row + ROWS <= last; row += ROWS) NAME(tile)(s, row, vector, ROWS, vectors, type);
  for (; row < last; row++) NAME(tile)(s, row, vector, 1, vectors, type);
}

/* All vectors for a few rows, which stay in the first-level cache meanwhile. */
TARGET static inline __attribute__((always_inline)) void NAME(typed)(const struct scan *s, int64_t row, int64_t last,
                                                                    const int type) {
  int64_t vector = 0;
  for (; vector + VECTORS <= s->count; vector += VECTORS) NAME(rows_of)(s, row, last, VECTORS, vector, type);
  if (s->count - vector >= 2) NAME(rows_of)(s, row, last, 2, vector, type), vector += 2;
  if (s->count > vector) NAME(rows_of)(s, row, last, 1, vector, type);
}

TARGET static void NAME(run)(const struct scan *s, int64_t row, int64_t last) {
  if (s->dtype == INT8) NAME(typed)(s, row, last, INT8);
  else if (s->dtype == FLOAT32) NAME(typed)(s, row, last, FLOAT32);
  else if (s->dtype == BFLOAT16) NAME(typed)(s, row, last, BFLOAT16);
  else NAME(typed)(s, row, last, FLOAT16);
}

#undef LANES
#undef ROWS
#undef VECTORS
#undef TARGET
#undef NAME
#undef FROM_INT8
#undef FROM_UINT16
#undef FROM_FLOAT16
