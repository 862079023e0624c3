/* One call of the scan of a feature store (scan.c), as ctypes fills it in (sdi_kernels/cpu/scan.py: keep the two in
 * step). */
#ifndef SDI_SCAN_CALL_H
#define SDI_SCAN_CALL_H

#include "sketch.h"

#define INT8 3       /* beside enum dtype */
#define COLUMNS 4096 /* columns that are summed in one go */

struct scan {
  float *out;        /* (rows, count), dense */
  const void *codes; /* (rows, d); rows `row_stride` codes apart */
  int64_t row_stride, rows, d;
  const float *scales;  /* (rows), or NULL for 1 */
  const float *vectors; /* (count, d), dense */
  int64_t count;
  int32_t dtype, threads;
  void *parallel; /* GOMP_parallel of the OpenMP runtime that torch runs on, or NULL */
};

/* The vectors of a call as integers of 24 bits, three digits of 8 each, with one scale for COLUMNS columns: see
 * scan_int8.c. */
struct digits {
  int8_t *values;  /* (count, 3, width): width is d, a whole number of 64s */
  double *scales;  /* (count, chunks) */
  int32_t *offset; /* (count, 3, chunks): 128 times the sum of a digit, which reading codes as unsigned adds */
  int64_t width, chunks;
};

/* Whether this machine multiplies integers of 8 bits (AVX-512 VNNI). */
int sdi_scan_int8_serves(void);

/* Fill in `digits`; 0 where the vectors have no digits (infinities and NaN) or memory is short. */
int sdi_scan_int8_prepare(const struct scan *scan, struct digits *digits);

void sdi_scan_int8_free(struct digits *digits);

/* out of rows row .. last - 1. */
void sdi_scan_int8_run(const struct scan *scan, const struct digits *digits, int64_t row, int64_t last);

#endif
