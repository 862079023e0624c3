/* The two routes, one unit of one row at a time. Part of simd.h. */

/* ------------------------------------------------------------------------------------------------------------
 * fft: with z = CS_out(delta) + i CS_in(a), TS = Im(ifft(sum_l fft(z_l)^2)) / 2: one transform does both sides. */

INLINE int binary_exponent(double x) { /* of a positive, normal x; libm's functions would be calls, four per token */
  uint64_t bits;
  memcpy(&bits, &x, 8);
  return (int)(bits >> 52) - 1023;
}

INLINE float power_of_two(int exponent) {
  uint32_t bits = (uint32_t)(exponent + 127) << 23;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

/* Token t as a complex vector; false where it contributes nothing. */
INLINE int stage(const struct job *job, int64_t row, int64_t t, float *buffer, float *staged) {
  int64_t d_g = job->grads.s.d, d_a = job->acts.s.d;
  float *signed_x = buffer + round_up(d_g, 16) + round_up(d_a, 16);
  const float *g = token(&job->grads.s, row, t, buffer);
  const float *a = token(&job->acts.s, row, t, buffer + round_up(d_g, 16));
  double gg = sum_of_squares(g, d_g), aa = sum_of_squares(a, d_a);
  /* Both sides share one complex number, so rounding is relative to the larger: bring them to about equal norms by a
   * power of two (exact), which cancels in their product. */
  float up = 1, down = 1;
  if (isfinite(gg) && isfinite(aa)) {
    if (gg == 0 || aa == 0) return 0;
    int exponent = (binary_exponent(aa) - binary_exponent(gg)) / 4; /* from sums of squares: may pass a float's range */
    exponent = exponent > 126 ? 126 : exponent < -126 ? -126 : exponent;
    up = power_of_two(exponent), down = power_of_two(-exponent);
  }
  count_sketch(&job->grads, g, up, signed_x, staged);
  count_sketch(&job->acts, a, down, signed_x, staged + LANES);
  return 1;
}

static void fft_unit(const struct job *job, int64_t row, int64_t unit, float *partial, float *scratch) {
  const struct call *call = job->call;
  int64_t m = call->m, first = unit * FFT_UNIT;
  int64_t last = first + FFT_UNIT < call->tokens ? first + FFT_UNIT : call->tokens;
  float *staged = scratch, *work = scratch + 2 * m, *buffer = scratch + 4 * m;
  memset(partial, 0, sizeof(float) * 2 * m);
  memset(staged, 0, sizeof(float) * 2 * m);
  for (int64_t t = first; t < last; t++)
    if (stage(job, row, t, buffer, staged)) transform_and_square(job->plan, staged, work, partial);
}

static void fft_finish(const struct job *job, int64_t row, const float *total, float *scratch) {
  int64_t m = job->call->m;
  float *out = job->call->out + row * job->call->out_stride, scale = -0.5f / (float)m;
  transform_back(job->plan, total, scratch); /* Im(ifft(S)) = -Im(fft(conj S)) / m */
  for (int64_t p = 0; p < m; p += LANES) *(VU *)(out + p) += scale * *(const V *)(scratch + 2 * p + LANES);
}

/* ------------------------------------------------------------------------------------------------------------
 * direct: tiles of G = sum_l delta_l (x) a_l stay in registers and are added to the buckets from there. */

/* G[i][j] = sum_t panel_g[t][i] panel_a[t][j] for one tile. */
INLINE void tile(const float *panel_g, const float *panel_a, int64_t depth, V acc[TILE_ROWS][TILE_VECTORS]) {
  UNROLL for (int i = 0; i < TILE_ROWS; i++) UNROLL for (int j = 0; j < TILE_VECTORS; j++) acc[i][j] = (V){};
  for (int64_t t = 0; t < depth; t++) {
    V a[TILE_VECTORS];
    UNROLL for (int j = 0; j < TILE_VECTORS; j++) a[j] = *(const V *)(panel_a + t * TILE_COLUMNS + j * LANES);
    UNROLL for (int i = 0; i < TILE_ROWS; i++) {
      float g = panel_g[t * TILE_ROWS + i];
      UNROLL for (int j = 0; j < TILE_VECTORS; j++) acc[i][j] += g * a[j];
    }
  }
}

/* Floats of one panel of `wide` columns: whole vectors are stored, so the last token's may run over. */
INLINE int64_t panel_floats(int64_t depth, int wide) { return round_up(depth * wide + LANES, 16); }

/* Token t (n values) into panels of `wide` columns, times its signs: panel p has it at p * panel_floats + t * wide. */
INLINE void pack(const float *x, const float *sign, int64_t n, const int wide, int64_t depth, int64_t t,
                 float *panels) {
  int64_t start = 0, size = panel_floats(depth, wide);
  float *y = panels + t * wide;
  /* Over-reading stays inside the row for all but the last panels. */
  for (; start + round_up(wide, LANES) <= n; start += wide, y += size)
    UNROLL for (int k = 0; k < wide; k += LANES)
      *(VU *)(y + k) = *(const VU *)(x + start + k) * *(const VU *)(sign + start + k);
  for (; start < n; start += wide, y += size)
    for (int k = 0; k < wide; k++) y[k] = start + k < n ? x[start + k] * sign[start + k] : 0;
}

/* Tile times the metric at its place. G is linear in the metric, so a sum over some of the tokens may be multiplied. */
INLINE void apply_metric(const float *metric, int64_t stride, int64_t rows, int64_t columns,
                         V acc[TILE_ROWS][TILE_VECTORS]) {
  UNROLL for (int k = 0; k < TILE_ROWS; k++) {
    if (k < rows) {
      const float *at = metric + k * stride;
      float edge[TILE_COLUMNS] = {0}; /* whole vectors would read beyond the last row's end */
      if (columns < TILE_COLUMNS) {
        for (int64_t c = 0; c < columns; c++) edge[c] = at[c];
        at = edge;
      }
      UNROLL for (int c = 0; c < TILE_VECTORS; c++) acc[k][c] *= *(const VU *)(at + c * LANES);
    }
  }
}

/* The part of a side that the next unit reads: `count` tokens from `at` on, of `bytes` each. */
struct part {
  const char *at;
  int64_t count, stride, bytes;
};

INLINE struct part part_of(const struct side *s, int64_t row, int64_t first, int64_t count, int64_t from, int64_t n) {
  int64_t size = s->dtype == FLOAT32 ? 4 : 2;
  const char *at = (const char *)s->data + (row * s->row_stride + first * s->token_stride + from) * size;
  return (struct part){at, count, s->token_stride * size, n * size};
}

INLINE void prefetch(struct part *part, int64_t tokens) {
  for (; tokens > 0 && part->count > 0; tokens--, part->count--, part->at += part->stride)
    for (int64_t k = 0; k < part->bytes; k += 64) __builtin_prefetch(part->at + k, 0, 2);
}

/* What this worker packs next is brought closer while tiles are multiplied: packing waits for memory, tiles do not. */
INLINE void upcoming(const struct job *job, int64_t row, int64_t unit, struct part *next_g, struct part *next_a) {
  const struct side *grads = &job->grads.s, *acts = &job->acts.s;
  int64_t next = unit + 1 < job->units ? unit + 1 : 0;
  if (next == 0) row += job->workers;
  if (job->workers == 0 || row >= job->call->rows) return;
  int64_t first = next / job->row_chunks * job->depth, left = job->call->tokens - first;
  int64_t count = left < job->depth ? left : job->depth;
  int64_t top = grads->d > job->height ? 0 : next % job->row_chunks * DIRECT_ROWS; /* a folded side is read whole */
  int64_t n = grads->d > job->height || grads->d - top < DIRECT_ROWS ? grads->d - top : DIRECT_ROWS;
  *next_g = part_of(grads, row, first, count, top, n);
  *next_a = part_of(acts, row, first, count, 0, acts->d);
}

static void direct_unit(const struct job *job, int64_t row, int64_t unit, float *partial, float *scratch) {
  const struct call *call = job->call;
  const struct view *grads = &job->grads, *acts = &job->acts;
  int64_t m = call->m, first = unit / job->row_chunks * job->depth, top = unit % job->row_chunks * DIRECT_ROWS;
  int64_t depth = call->tokens - first < job->depth ? call->tokens - first : job->depth;
  int64_t height = job->height - top < DIRECT_ROWS ? job->height - top : DIRECT_ROWS;
  int64_t width = job->width;
  int fold_g = grads->s.d > job->height, fold_a = acts->s.d > job->width;
  float *panels_g = scratch, *panels_a = panels_g + job->panels_g;
  float *folded_g = panels_a + job->panels_a, *folded_a = folded_g + m, *buffer = folded_a + m;
  float *signed_x = buffer + (grads->s.d > acts->s.d ? grads->s.d : acts->s.d);
  memset(folded_g, 0, sizeof(float) * 2 * m);

  for (int64_t t = 0; t < depth; t++) {
    const float *g = token(&grads->s, row, first + t, buffer);
    if (fold_g) count_sketch(grads, g, 1, signed_x, folded_g), g = folded_g;
    pack(g + top, fold_g ? job->ones : grads->sign + top, height, TILE_ROWS, depth, t, panels_g);
    const float *a = token(&acts->s, row, first + t, buffer);
    if (fold_a) count_sketch(acts, a, 1, signed_x, folded_a), a = folded_a;
    pack(a, fold_a ? job->ones : acts->sign, width, TILE_COLUMNS, depth, t, panels_a);
  }

  struct part next_g = {0}, next_a = {0};
  upcoming(job, row, unit, &next_g, &next_a);
  int64_t tiles = ((height + TILE_ROWS - 1) / TILE_ROWS) * ((width + TILE_COLUMNS - 1) / TILE_COLUMNS);
  int64_t tokens_each = (job->depth + tiles - 1) / tiles;

  /* Positions h_out(i) + j run past m; the overhang is folded back in direct_finish. */
  memset(partial, 0, sizeof(float) * job->partial);
  const int32_t *h_out = grads->s.bucket, *h_in = acts->s.bucket;
  for (int64_t j = 0; j < width; j += TILE_COLUMNS) {
    for (int64_t i = 0; i < height; i += TILE_ROWS) {
      V acc[TILE_ROWS][TILE_VECTORS];
      prefetch(&next_g, tokens_each), prefetch(&next_a, tokens_each);
      tile(panels_g + i / TILE_ROWS * panel_floats(depth, TILE_ROWS),
           panels_a + j / TILE_COLUMNS * panel_floats(depth, TILE_COLUMNS), depth, acc);
      int64_t used = height - i < TILE_ROWS ? height - i : TILE_ROWS;
      int64_t columns = width - j < TILE_COLUMNS ? width - j : TILE_COLUMNS;
      if (call->metric)
        apply_metric(call->metric + (top + i) * call->metric_stride + j, call->metric_stride, used, columns, acc);
      if (acts->contiguous || fold_a) {
        UNROLL for (int k = 0; k < TILE_ROWS; k++) {
          if (k < used) {
            float *at = partial + (fold_g ? top + i + k : h_out[top + i + k]) + j;
            UNROLL for (int c = 0; c < TILE_VECTORS; c++) *(VU *)(at + c * LANES) += acc[k][c];
          }
        }
      } else {
        float values[TILE_ROWS][TILE_COLUMNS] __attribute__((aligned(64)));
        memcpy(values, acc, sizeof(values));
        for (int64_t k = 0; k < used; k++) {
          float *at = partial + (fold_g ? top + i + k : h_out[top + i + k]);
          for (int64_t c = 0; c < columns; c++) at[h_in[j + c]] += values[k][c];
        }
      }
    }
  }
}

static void direct_finish(const struct job *job, int64_t row, const float *total, float *scratch) {
  int64_t m = job->call->m, over = job->partial - m < m ? job->partial - m : m; /* beyond 2m lies padding: zeros */
  float *out = job->call->out + row * job->call->out_stride;
  (void)scratch;
  for (int64_t p = 0; p < over; p++) out[p] += total[p] + total[m + p];
  for (int64_t p = over; p < m; p++) out[p] += total[p];
}

static void add(float *total, const float *partial, int64_t count) {
  for (int64_t i = 0; i < count; i++) total[i] += partial[i];
}

static void unit(const struct job *job, int64_t row, int64_t index, float *partial, float *scratch) {
  if (job->call->route == FFT) fft_unit(job, row, index, partial, scratch);
  else direct_unit(job, row, index, partial, scratch);
}

static void finish(const struct job *job, int64_t row, const float *total, float *scratch) {
  if (job->call->route == FFT) fft_finish(job, row, total, scratch);
  else direct_finish(job, row, total, scratch);
}

const struct variant VARIANT = {
    VARIANT_NAME, LANES, TILE_ROWS, TILE_COLUMNS, unit, finish, add, vector_row, rows_row, matrices,
};
