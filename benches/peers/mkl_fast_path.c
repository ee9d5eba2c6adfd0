/* Preloaded before torch, this lets Intel's MKL inside it use its fastest products (AVX-512) on processors of other
 * makers too: MKL asks these two functions of its own and falls back to slower code where they say no. */
int mkl_serv_intel_cpu(void) { return 1; }
int mkl_serv_intel_cpu_true(void) { return 1; }
