/* Gradients that are there row by row: of a lookup, or whole matrices. Part of simd.h. */

/* partial[h(id) + h_in(j)] += sign * x[j] * s_in(j), without the remainder: `partial` has 2 m entries. */
INLINE void add_row(const struct side *s, int contiguous, const float *restrict x, float sign,
                    float *restrict at) {
  const int32_t *bucket = s->bucket;
  const int8_t *signs = s->sign;
  int64_t d = s->d;
  if (contiguous) {
    for (int64_t j = 0; j < d; j++) at[j] += x[j] * ((float)signs[j] * sign);
    return;
  }
  float values[256];
  for (int64_t first = 0; first < d; first += 256) {
    int64_t count = d - first < 256 ? d - first : 256;
    for (int64_t j = 0; j < count; j++) values[j] = x[first + j] * ((float)signs[first + j] * sign);
    for (int64_t j = 0; j < count; j++) at[bucket[first + j]] += values[j];
  }
}

/* out += TensorSketch of a matrix whose rows ids[l] are given; every row of it, in order, without ids.
 *
 * `acts` are the rows, `grads` the ids (int64) and the tables of the other side. Partial sums of a few additions to
 * each bucket keep the rounding error from growing with the number of rows. */
static void rows_row(const struct job *job, int64_t row, float *scratch) {
  const struct call *call = job->call;
  const struct side *given = &call->acts, *side = &call->grads;
  int64_t m = call->m, d = given->d, unit = job->depth;
  float *total = scratch, *partial = total + 2 * m, *buffer = partial + 2 * m, *scaled = buffer + round_up(d, 16);
  const int64_t *ids = side->data;
  memset(total, 0, sizeof(float) * 2 * m);
  for (int64_t first = 0; first < call->tokens; first += unit) {
    int64_t last = first + unit < call->tokens ? first + unit : call->tokens;
    float *sum = first ? partial : total;
    if (first) memset(partial, 0, sizeof(float) * 2 * m);
    for (int64_t t = first; t < last; t++) {
      int64_t id = ids ? ids[row * side->row_stride + t * side->token_stride] : t;
      const float *x = token(given, row, t, buffer);
      if (call->metric) {
        const float *metric = call->metric + id * call->metric_stride;
        for (int64_t j = 0; j < d; j++) scaled[j] = x[j] * metric[j];
        x = scaled;
      }
      add_row(given, job->acts.contiguous, x, side->sign[id], sum + side->bucket[id]);
    }
    if (first) {
      for (int64_t p = 0; p < 2 * m; p++) total[p] += partial[p];
    }
  }
  float *out = call->out + row * call->out_stride;
  for (int64_t p = 0; p < m; p++) out[p] += total[p] + total[m + p];
}

/* Entries first .. first + n of one row, as floats. */
INLINE const float *entries(const struct side *s, int64_t row, int64_t t, int64_t first, int64_t n, float *buffer) {
  int64_t at = row * s->row_stride + t * s->token_stride + first;
  if (s->dtype == FLOAT32) return (const float *)s->data + at;
  const uint16_t *half = (const uint16_t *)s->data + at;
  if (s->dtype == BFLOAT16) from_bfloat16(half, buffer, n);
  else from_float16(half, buffer, n);
  return buffer;
}

typedef float V4 __attribute__((vector_size(16), may_alias));

/* The same for MATRICES whole matrices side by side, whose columns are scattered: a bucket of all of them is one vector,
 * read and written once. Where the call has fewer, the last one is there several times. */
static void matrices(const struct job *job, int64_t group, float *scratch) {
  const struct call *call = job->call;
  const struct side *given = &call->acts, *side = &call->grads;
  int64_t m = call->m, d = given->d, unit = job->depth, row = group * MATRICES;
  int64_t last_row = call->rows - row < MATRICES ? call->rows - row - 1 : MATRICES - 1;
  float *total = scratch, *partial = total + MATRICES * m;
  float factor[256], buffer[MATRICES][256];
  int32_t place[256];
  memset(total, 0, sizeof(float) * MATRICES * m);
  for (int64_t begin = 0; begin < call->tokens; begin += unit) {
    int64_t end = begin + unit < call->tokens ? begin + unit : call->tokens;
    float *sum = begin ? partial : total;
    if (begin) memset(partial, 0, sizeof(float) * MATRICES * m);
    for (int64_t t = begin; t < end; t++) {
      float sign = side->sign[t];
      for (int64_t first = 0; first < d; first += 256) {
        int64_t count = d - first < 256 ? d - first : 256;
        const float *x[MATRICES];
        UNROLL for (int k = 0; k < MATRICES; k++)
          x[k] = entries(given, row + (k < last_row ? k : last_row), t, first, count, buffer[k]);
        for (int64_t j = 0; j < count; j++) {
          int32_t p = given->bucket[first + j] + side->bucket[t];
          place[j] = p - (p >= m ? (int32_t)m : 0);
          factor[j] = given->sign[first + j] * sign;
        }
        if (call->metric) {
          const float *metric = call->metric + t * call->metric_stride + first;
          for (int64_t j = 0; j < count; j++) factor[j] *= metric[j];
        }
        for (int64_t j = 0; j < count; j++)
          *(V4 *)(sum + MATRICES * place[j]) += (V4){x[0][j], x[1][j], x[2][j], x[3][j]} * factor[j];
      }
    }
    if (begin) {
      for (int64_t p = 0; p < MATRICES * m; p++) total[p] += partial[p];
    }
  }
  for (int64_t k = 0; k <= last_row; k++) {
    float *out = call->out + (row + k) * call->out_stride;
    for (int64_t p = 0; p < m; p++) out[p] += total[MATRICES * p + k];
  }
}
