/* The multiply-add rate of a core: chains of dependent multiply-adds in registers, as many as hide their latency. */

#if defined(__AVX512F__)
enum { W = 16 };
#elif defined(__AVX__)
enum { W = 8 };
#else
enum { W = 4 };
#endif
enum { CHAINS = 12 };

typedef float vec __attribute__((vector_size(4 * W)));

/* Make `count` rounds; returns floating-point operations in one. The sum keeps the compiler from leaving them out. */
long multiply_add(long count, float *sum)
{
    vec a[CHAINS], x = (vec){0} + 0.999999f, y = (vec){0} + 1e-7f;
    for (int i = 0; i < CHAINS; i++) a[i] = (vec){0} + (float)i;
    for (long n = 0; n < count; n++)
#pragma GCC unroll 12
        for (int i = 0; i < CHAINS; i++) a[i] = a[i] * x + y;
    for (int i = 0; i < CHAINS; i++) *sum += a[i][0];
    return 2L * W * CHAINS;
}
