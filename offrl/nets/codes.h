/* Rows of a leaf of the search tree that may be near enough to queries, by 7-bit codes; neighbor_codes.py says what they bound. */

#if defined(__AVX2__)
#include <immintrin.h>
#endif

enum { LEAF = 64 };                             /* rows in a leaf */
enum { ABREAST = LEAF / W < 4 ? LEAF / W : 4 }; /* vectors of rows whose sums stay in registers */

/* sum[j] += the product of the four codes rows[4 j] ... and the four in `asked`: each below 128 times one of at most 64. */
INLINE bits add_products(bits sum, const uint8_t *rows, int32_t asked)
{
#if defined(__AVX512VNNI__)
    return (bits)_mm512_dpbusd_epi32((__m512i)sum, _mm512_loadu_si512(rows), _mm512_set1_epi32(asked));
#elif defined(__AVX512BW__)
    const __m512i pairs = _mm512_maddubs_epi16(_mm512_loadu_si512(rows), _mm512_set1_epi32(asked));
    return sum + (bits)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#elif defined(__AVX2__) && !defined(__AVX512F__)
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_loadu_si256((const __m256i *)rows), _mm256_set1_epi32(asked));
    return sum + (bits)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
    int8_t four[4];
    memcpy(four, &asked, sizeof four);
    for (int j = 0; j < W; j++)
        for (int i = 0; i < 4; i++) sum[j] += rows[4 * j + i] * four[i];
    return sum;
#endif
}

/* Bit j: whether x[j] is at least `least`. */
INLINE uint32_t at_least(vec x, float least)
{
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(least), _CMP_GE_OQ);
#elif defined(__AVX2__)
    return (uint32_t)_mm256_movemask_ps((__m256)(x >= least));
#else
    uint32_t bits_of = 0;
    for (int j = 0; j < W; j++) bits_of |= (uint32_t)(x[j] >= least) << j;
    return bits_of;
#endif
}

/* Fill `pairs` with (query, row) for every row of the leaf that may lie within a query's limit; their number.

   codes: [groups, LEAF, 4], the leaf's rows, four dimensions in a group, those of actions in groups of their own, which come
   first. starts: [2, LEAF]. asked: [queries, 4 groups]. terms: [queries, 5]. limits: [queries], squared distances.
   callers: numbers of `count` queries. pairs: room for 2 count LEAF numbers. */
int64_t close_rows(const uint8_t *codes, const int32_t *starts, int64_t action_groups, int64_t groups, const int8_t *asked,
                   const double *terms, const float *limits, const int32_t *callers, int64_t count, int32_t *pairs)
{
    int64_t found = 0;
    /* The next leaf, since a batch of questions visits nearly every leaf in turn. */
    for (long i = 0; i < 4 * groups * LEAF; i += 64) __builtin_prefetch(codes + 4 * groups * LEAF + i);
    for (long i = 0; i < 2 * LEAF; i += LINE) __builtin_prefetch(starts + 2 * LEAF + i);
    for (long c = 0; c < count; c++) {
        const long q = callers[c];
        const double *term = terms + 5 * q, far = sqrt(limits[q]) + term[3];
        const float by_action = (float)term[0], by_state = (float)term[1];
        const float least = (float)((term[2] - far * far * (1 + 1e-6)) / 2 - term[4]);
        for (long first = 0; first < LEAF; first += ABREAST * W) {
            bits sum[2][ABREAST];
            for (int part = 0; part < 2; part++)
                for (int v = 0; v < ABREAST; v++) sum[part][v] = *(const bits *)(starts + part * LEAF + first + v * W);
            for (long g = 0; g < groups; g++) {
                int32_t four;
                memcpy(&four, asked + 4 * (q * groups + g), sizeof four);
                const uint8_t *rows = codes + 4 * (g * LEAF + first);
                if (g < action_groups)
                    for (int v = 0; v < ABREAST; v++) sum[0][v] = add_products(sum[0][v], rows + 4 * v * W, four);
                else
                    for (int v = 0; v < ABREAST; v++) sum[1][v] = add_products(sum[1][v], rows + 4 * v * W, four);
            }
            for (int v = 0; v < ABREAST; v++) {
                const vec nearness = by_action * __builtin_convertvector(sum[0][v], vec) +
                                     by_state * __builtin_convertvector(sum[1][v], vec);
                for (uint32_t rest = at_least(nearness, least); rest; rest &= rest - 1, found++) {
                    pairs[2 * found] = (int32_t)q;
                    pairs[2 * found + 1] = (int32_t)(first + v * W + __builtin_ctz(rest));
                }
            }
        }
    }
    return found;
}
