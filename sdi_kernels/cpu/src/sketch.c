/* Driver of the CPU kernels: picks the instruction set, prepares tables, shares out the rows of a call.
 *
 * Called through ctypes (sdi_kernels/cpu/native.py), so it knows nothing of Python. Threads: by GOMP_parallel of the
 * OpenMP runtime torch itself runs on, so that both share one pool; a second pool would compete with torch's workers,
 * which spin between parallel regions. Where that entry is missing, plain threads are started.
 */
#include "sketch.h"

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define MAX_LOG2 24
#define MAX_THREADS 256

extern const struct variant sdi_baseline;
#if defined(__x86_64__)
extern const struct variant sdi_avx2, sdi_avx512;
#endif

enum { OK = 0, NO_MEMORY = 1, UNSUPPORTED = 2 }; /* UNSUPPORTED: the caller has another way */

static _Atomic(const struct variant *) chosen;

static const struct variant *find(const char *name) {
  const struct variant *all[3];
  int count = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))
    all[count++] = &sdi_avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) all[count++] = &sdi_avx2;
#endif
  all[count++] = &sdi_baseline;
  for (int k = 0; k < count; k++)
    if (!name || strcmp(name, all[k]->name) == 0) return all[k];
  return NULL;
}

/* Scratch. One block is kept for the next call: given back to the system, its pages would have to be cleared and mapped
 * again each time, which costs a small call as much as its work. */
static pthread_mutex_t scratch_lock = PTHREAD_MUTEX_INITIALIZER;
static float *spare;
static int64_t spare_floats, peak_floats;

static float *take_scratch(int64_t floats) {
  void *memory = NULL;
  pthread_mutex_lock(&scratch_lock);
  if (floats > peak_floats) peak_floats = floats;
  if (floats <= spare_floats) memory = spare, spare = NULL, spare_floats = 0;
  pthread_mutex_unlock(&scratch_lock);
  if (!memory && posix_memalign(&memory, 64, (size_t)floats * sizeof(float))) return NULL;
  return memory;
}

static void give_scratch(float *memory, int64_t floats) {
  pthread_mutex_lock(&scratch_lock);
  if (floats >= spare_floats) {
    float *old = spare;
    spare = memory, spare_floats = floats, memory = old;
  }
  pthread_mutex_unlock(&scratch_lock);
  free(memory);
}

/* Largest scratch since the last call of this function, in bytes. */
EXPORT int64_t sdi_peak_bytes(void) {
  pthread_mutex_lock(&scratch_lock);
  int64_t peak = peak_floats;
  peak_floats = 0;
  pthread_mutex_unlock(&scratch_lock);
  return peak * (int64_t)sizeof(float);
}

static const struct variant *variant(void) {
  const struct variant *v = atomic_load(&chosen);
  if (!v) atomic_store(&chosen, v = find(NULL));
  return v;
}

/* ------------------------------------------------------------------------------------------------------------
 * Tables of the transform, made once per size and variant and kept. */

static struct fft_plan *plans[3][MAX_LOG2 + 1];
static pthread_mutex_t plans_lock = PTHREAD_MUTEX_INITIALIZER;

static int log2_exact(int64_t m) {
  int k = 0;
  while ((int64_t)1 << k < m) k++;
  return (int64_t)1 << k == m && k <= MAX_LOG2 ? k : -1;
}

static void root(int64_t power, int64_t n, float *re, float *im) {
  double angle = -2 * 3.14159265358979323846 * (double)(power % n) / (double)n;
  *re = (float)cos(angle), *im = (float)sin(angle);
}

static struct fft_plan *make_plan(int64_t m, int lanes) {
  int64_t columns = m / lanes, outer = columns / lanes; /* outer: product of the passes' radices */
  struct fft_plan plan = {.m = m, .columns = columns};
  for (int64_t rest = outer; rest > 1; rest /= plan.radix[plan.passes++])
    plan.radix[plan.passes] = rest % 8 == 0 && rest != 16 ? 8 : rest % 4 == 0 ? 4 : 2;
  int64_t floats = 2 * m;
  for (int64_t k = 0, length = columns; k < plan.passes; length /= plan.radix[k++])
    floats += length / plan.radix[k] * 2 * (plan.radix[k] - 1);
  struct fft_plan *made = malloc(sizeof(plan));
  float *at = NULL;
  if (!made || posix_memalign((void **)&at, 64, sizeof(float) * floats)) {
    free(made);
    return NULL;
  }
  plan.lane_twiddle = at;
  for (int64_t b = 0; b < outer; b++) {
    /* Block b holds the outputs q1, q2, ... of the passes; as a frequency of the column transform their order is
     * reversed: q1 + radix1 (q2 + radix2 (...)). */
    int64_t reversed = 0, rest = b, below = outer, scale = 1;
    for (int k = 0; k < plan.passes; k++) {
      below /= plan.radix[k];
      reversed += rest / below * scale, rest %= below, scale *= plan.radix[k];
    }
    for (int c = 0; c < lanes; c++) {
      int64_t k2 = reversed + outer * c;
      for (int lane = 0; lane < lanes; lane++) {
        float *w = at + (b * lanes + c) * 2 * lanes + lane;
        root(lane * k2, m, w, w + lanes);
      }
    }
  }
  at += 2 * m;
  for (int64_t k = 0, length = columns; k < plan.passes; length /= plan.radix[k++]) {
    plan.pass_twiddle[k] = at;
    for (int64_t j = 0; j < length / plan.radix[k]; j++)
      for (int64_t q = 1; q < plan.radix[k]; q++, at += 2) root(j * q, length, at, at + 1);
  }
  *made = plan;
  return made;
}

static const struct fft_plan *get_plan(int64_t m, int lanes) {
  struct fft_plan **slot = &plans[lanes == 16 ? 2 : lanes == 8][log2_exact(m)];
  pthread_mutex_lock(&plans_lock);
  if (!*slot) *slot = make_plan(m, lanes);
  struct fft_plan *plan = *slot;
  pthread_mutex_unlock(&plans_lock);
  return plan;
}

/* ------------------------------------------------------------------------------------------------------------
 * Sharing out the work: workers draw tasks from a counter, so any number of them will do. */

struct work {
  const struct job *job;
  const struct variant *variant;
  void (*task)(struct work *, int64_t index, float *scratch);
  atomic_llong next;
  atomic_int worker;
  int64_t tasks, scratch_each, first_row;
  float *scratch, *partials;
};

static void *run_worker(void *argument) {
  struct work *work = argument;
  float *scratch = work->scratch + atomic_fetch_add(&work->worker, 1) * work->scratch_each;
  for (int64_t index; (index = atomic_fetch_add(&work->next, 1)) < work->tasks;) work->task(work, index, scratch);
  return NULL;
}

static void run_worker_void(void *argument) { run_worker(argument); }

static void run(struct work *work, int threads) {
  atomic_init(&work->next, 0);
  atomic_init(&work->worker, 0);
  if (threads > work->tasks) threads = (int)work->tasks;
  if (threads <= 1) {
    run_worker(work);
  } else if (work->job->call->parallel) {
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
    memcpy(&parallel, &work->job->call->parallel, sizeof(parallel));
    parallel(run_worker_void, work, (unsigned)threads, 0);
  } else {
    pthread_t started[MAX_THREADS];
    int count = 0;
    while (count < threads - 1 && pthread_create(&started[count], NULL, run_worker, work) == 0) count++;
    run_worker(work);
    while (count > 0) pthread_join(started[--count], NULL);
  }
}

/* A whole row. Scratch: [total][partial][the unit's own]. */
static void row_task(struct work *work, int64_t index, float *scratch) {
  const struct job *job = work->job;
  float *total = scratch, *partial = total + job->partial, *rest = partial + (job->units > 1 ? job->partial : 0);
  work->variant->unit(job, index, 0, total, rest);
  for (int64_t u = 1; u < job->units; u++) {
    work->variant->unit(job, index, u, partial, rest);
    work->variant->add(total, partial, job->partial);
  }
  work->variant->finish(job, index, total, rest);
}

/* One unit of a row, into its own slot; and the same sum over slots as in row_task. */
static void unit_task(struct work *work, int64_t index, float *scratch) {
  const struct job *job = work->job;
  work->variant->unit(job, work->first_row + index / job->units, index % job->units,
                      work->partials + index * job->partial, scratch);
}

static void sum_task(struct work *work, int64_t index, float *scratch) {
  const struct job *job = work->job;
  float *total = work->partials + index * job->units * job->partial;
  for (int64_t u = 1; u < job->units; u++) work->variant->add(total, total + u * job->partial, job->partial);
  work->variant->finish(job, work->first_row + index, total, scratch);
}

static void vector_task(struct work *work, int64_t index, float *scratch) {
  work->variant->vector(work->job, index, scratch);
}

static void rows_task(struct work *work, int64_t index, float *scratch) {
  work->variant->rows(work->job, index, scratch);
}

static void matrices_task(struct work *work, int64_t index, float *scratch) {
  work->variant->matrices(work->job, index, scratch);
}

/* ------------------------------------------------------------------------------------------------------------ */

/* Floats that look() needs for a side. */
static int64_t view_floats(const struct side *side) { return 3 * side->d + 1; }

/* Position of bucket p in the kernels' buffers: `lanes` > 0: in a complex array (simd.h), 0: plain. */
static void look(struct view *view, const struct side *side, float *memory, int64_t m, int lanes) {
  int64_t d = side->d, k = 0;
  view->s = *side, view->sign = memory, view->contiguous = d <= m, view->stored = 0;
  view->from = (int32_t *)(memory + d), view->to = (int32_t *)(memory + 2 * d);
  for (int64_t i = 0; i < d; i++) {
    view->sign[i] = side->sign[i];
    view->contiguous &= side->bucket[i] == i;
  }
  if (view->contiguous || (d <= m && !lanes)) return; /* the layers are not used */
  for (int layer = 0; layer < side->sources_each; layer++) {
    for (int64_t p = 0; p < m && k < d; p++) {
      int32_t source = side->sources[p * side->sources_each + layer];
      view->from[k] = (source < 0 ? -source : source) - 1;
      view->to[k] = (int32_t)(lanes ? 2 * p - p % lanes : p);
      k += source != 0; /* an empty slot is overwritten by the next one: no branch */
    }
    if (layer == 0) view->stored = k;
  }
}

/* As many threads as asked for and as fit into the budget; 0: not even one does. */
static int clamp_threads(const struct call *call, int64_t each, int64_t shared) {
  int64_t fit = (call->budget - shared) / (each > 0 ? each : 1), threads = call->threads;
  if (threads > fit) threads = fit;
  if (threads > MAX_THREADS) threads = MAX_THREADS;
  return fit < 1 ? 0 : threads < 1 ? 1 : (int)threads;
}

static void measure(struct job *job, const struct variant *v) {
  const struct call *call = job->call;
  int64_t m = call->m, g = call->grads.d, a = call->acts.d;
  if (call->route == FFT) {
    job->units = (call->tokens + FFT_UNIT - 1) / FFT_UNIT;
    job->partial = 2 * m;
    job->scratch = 4 * m + round_up(g, 16) + round_up(a, 16) + (g > a ? g : a);
    return;
  }
  int fold = call->metric == NULL;
  job->height = fold && g > m ? m : g, job->width = fold && a > m ? m : a;
  int64_t tall = round_up(DIRECT_ROWS, v->tile_rows), wide = round_up(job->width, v->tile_columns);
  int64_t depth = DIRECT_PANELS / (tall + wide);
  depth = depth < 16 ? 16 : depth > DIRECT_DEPTH ? DIRECT_DEPTH : depth;
  if (depth > call->tokens) depth = call->tokens;
  job->depth = depth;
  job->row_chunks = (job->height + DIRECT_ROWS - 1) / DIRECT_ROWS;
  job->units = (call->tokens + depth - 1) / depth * job->row_chunks;
  job->partial = round_up(m + (wide > m && job->width <= m ? wide : m), 16);
  job->panels_g = tall / v->tile_rows * round_up(depth * v->tile_rows + v->lanes, 16);
  job->panels_a = wide / v->tile_columns * round_up(depth * v->tile_columns + v->lanes, 16);
  job->scratch = job->panels_g + job->panels_a + 2 * m + 2 * (g > a ? g : a);
}

static int64_t worker_floats(const struct job *job) {
  return round_up(job->scratch + job->partial * (job->units > 1 ? 2 : 1), 16);
}

EXPORT int sdi_supports(int64_t m) {
  return log2_exact(m) >= 0 && m >= (int64_t)variant()->lanes * variant()->lanes;
}

EXPORT const char *sdi_variant(void) { return variant()->name; }

/* Another instruction set, if this machine has it (SDI_KERNELS_CPU, tests); NULL: the best. */
EXPORT int sdi_set_variant(const char *name) {
  const struct variant *v = find(name);
  if (v) atomic_store(&chosen, v);
  return v ? OK : UNSUPPORTED;
}

/* out[r] += TensorSketch(metric * sum_l grads[r, l] (x) acts[r, l]). The caller has checked shapes; rows and
 * tokens > 0. */
EXPORT int sdi_linear_sketch(const struct call *call) {
  const struct variant *v = variant();
  struct job job = {.call = call};
  if (call->route == FFT) {
    if (call->metric || !sdi_supports(call->m)) return UNSUPPORTED;
    if (!(job.plan = get_plan(call->m, v->lanes))) return NO_MEMORY;
  }
  measure(&job, v);
  int64_t each = worker_floats(&job), slot = sizeof(float);
  int64_t views = view_floats(&call->grads) + view_floats(&call->acts);
  int64_t ones = call->route == DIRECT && (call->grads.d > job.height || call->acts.d > job.width) ? call->m : 0;
  int64_t shared = round_up(views + ones, 16);
  int threads = clamp_threads(call, each * slot, shared * slot);
  if (!threads) return UNSUPPORTED;
  /* Fewer rows than threads: share out units, as many rows at a time as their partial sums fit. */
  int64_t slots = (call->budget / slot - shared - threads * each) / (job.units * job.partial);
  int split = call->rows < threads && job.units > 1 && slots > 0;
  if (slots > call->rows) slots = call->rows;
  int64_t floats = shared + threads * each + (split ? slots * job.units * job.partial : 0);
  float *memory = take_scratch(floats);
  if (!memory) return NO_MEMORY;
  int lanes = call->route == FFT ? v->lanes : 0;
  look(&job.grads, &call->grads, memory, call->m, lanes);
  look(&job.acts, &call->acts, memory + view_floats(&call->grads), call->m, lanes);
  job.ones = memory + views;
  for (int64_t p = 0; p < ones; p++) memory[views + p] = 1;
  struct work work = {.job = &job, .variant = v, .scratch = memory + shared, .scratch_each = each};
  if (!split) {
    job.workers = threads;
    work.task = row_task, work.tasks = call->rows;
    run(&work, threads);
  } else {
    work.partials = work.scratch + threads * each;
    for (work.first_row = 0; work.first_row < call->rows; work.first_row += slots) {
      int64_t rows = call->rows - work.first_row < slots ? call->rows - work.first_row : slots;
      work.task = unit_task, work.tasks = rows * job.units;
      run(&work, threads);
      work.task = sum_task, work.tasks = rows;
      run(&work, threads);
    }
  }
  give_scratch(memory, floats);
  return OK;
}

/* For the loader: a library of another version of the struct must not be called. */
EXPORT int64_t sdi_call_bytes(void) { return sizeof(struct call); }

/* out[r] += CountSketch(sum_l grads[r, l]); `acts` is not used. */
EXPORT int sdi_vector_sketch(const struct call *call) {
  struct job job = {.call = call};
  int64_t slot = sizeof(float);
  int64_t each = 4 * round_up(call->grads.d, 64), shared = round_up(view_floats(&call->grads), 16);
  int threads = clamp_threads(call, each * slot, shared * slot);
  if (!threads) return UNSUPPORTED;
  int64_t floats = shared + threads * each;
  float *memory = take_scratch(floats);
  if (!memory) return NO_MEMORY;
  look(&job.grads, &call->grads, memory, INT64_MAX, 0);
  struct work work = {.job = &job, .variant = variant(), .task = vector_task, .tasks = call->rows,
                      .scratch = memory + shared, .scratch_each = each};
  run(&work, threads);
  give_scratch(memory, floats);
  return OK;
}

/* out[r] += TensorSketch(metric * matrix) of the matrix with acts[r, l] in row ids[r, l], where rows that come several
 * times add up. The ids are the data of `grads`, int64 and in range; without them acts[r] is the matrix. */
EXPORT int sdi_rows_sketch(const struct call *call) {
  const struct side *given = &call->acts;
  struct job job = {.call = call};
  job.depth = ROWS_UNIT * call->m / given->d;
  job.depth = job.depth < ROWS_UNIT ? ROWS_UNIT : job.depth;
  job.acts.contiguous = given->d <= call->m;
  for (int64_t j = 0; job.acts.contiguous && j < given->d; j++) job.acts.contiguous = given->bucket[j] == j;
  int together = !call->grads.data && !job.acts.contiguous;
  int64_t each = together ? round_up(2 * MATRICES * call->m, 16)
                          : round_up(4 * call->m, 16) + 2 * round_up(given->d, 16);
  int threads = clamp_threads(call, each * sizeof(float), 0);
  if (!threads) return UNSUPPORTED;
  float *memory = take_scratch(threads * each);
  if (!memory) return NO_MEMORY;
  struct work work = {.job = &job, .variant = variant(), .task = together ? matrices_task : rows_task,
                      .tasks = together ? (call->rows + MATRICES - 1) / MATRICES : call->rows,
                      .scratch = memory, .scratch_each = each};
  run(&work, threads);
  give_scratch(memory, threads * each);
  return OK;
}
