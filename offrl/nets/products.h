/* Products of matrices: tiles, packed panels, and their order; `kernels.c` includes this behind its vectors of W numbers. */

/* What happens to a product's sums on their way to memory. */
typedef struct {
    const float *bias; /* added to each row; NULL: nothing is */
    const float *mask; /* shaped like the result: where it isn't positive the result is 0; NULL: no mask */
    int relu;
    int add; /* add to what is there: an earlier block of terms */
} Finish;

/* ---- one tile ------------------------------------------------------------------------------------------------- */

INLINE void finish_row(vec x0, vec x1, float *c, const float *mask, const Finish *finish, const float *bias)
{
    if (finish->add) x0 += load(c), x1 += load(c + W);
    if (bias) x0 += load(bias), x1 += load(bias + W);
    if (finish->relu) x0 = where_positive(x0, x0), x1 = where_positive(x1, x1);
    if (mask) x0 = where_positive(x0, load(mask)), x1 = where_positive(x1, load(mask + W));
    store(c, x0);
    store(c + W, x1);
}

/* Memory that is wanted soon: `rows` rows from `at` on, `next` apart, of `lines` lines each; `each` lines for each tile. It is asked
   for into the second cache: the panel and a tile's rows of A fill the first. */
typedef struct {
    const float *at;
    long next, rows, lines, line, each;
} Ahead;

INLINE void fetch(Ahead *ahead)
{
    for (long i = 0; i < ahead->each && ahead->rows; i++) {
        __builtin_prefetch(ahead->at + ahead->line * LINE, 0, 2);
        if (++ahead->line == ahead->lines) ahead->line = 0, ahead->at += ahead->next, ahead->rows--;
    }
}

/* Rows of C that are left to do: c[i ldc + j] = sum over p < k of a[i rows_a + p next_a] b[p next_b + j], for j < columns. */
typedef struct {
    long rows, columns, k;
    const float *a, *b;
    float *c;
    long ldc;
    Finish finish;
    Ahead ahead;
} Strip;

/* The first `rows` of them, a number that the compiler knows: it unrolls the loops over rows, and the sums stay in registers.

   Rows of A are asked for one line ahead, at the end those of the next tile: asked for a whole tile ahead, they and the panel
   would not fit into the nearest cache together. */
INLINE void tile(const int rows, const Strip *s, long rows_a, long next_a, long next_b)
{
    const Finish finish = s->finish;
    const float *a = s->a, *b = s->b, *mask = finish.mask;
    float *c = s->c;
    const long k = s->k, ldc = s->ldc, columns = s->columns;
    vec sum[MR][2];
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) {
        sum[i][0] = sum[i][1] = (vec){0};
        __builtin_prefetch(c + i * ldc, 1);
        if (mask) __builtin_prefetch(mask + i * ldc);
    }
    for (long left = k; left > 0; left -= LINE) {
        const float *soon = a + LINE + (left > LINE ? 0 : rows * rows_a - k);
        for (int i = 0; i < rows && rows_a != 1; i++) __builtin_prefetch(soon + i * rows_a);
        for (long p = left < LINE ? left : LINE; p > 0; p--) {
            const vec b0 = load(b), b1 = load(b + W);
#pragma GCC unroll 16
            for (int i = 0; i < rows; i++) {
                sum[i][0] += a[i * rows_a] * b0;
                sum[i][1] += a[i * rows_a] * b1;
            }
            if (rows_a == 1) __builtin_prefetch(a + 4 * next_a);
            a += next_a, b += next_b;
        }
    }
    if (columns == NR) {
#pragma GCC unroll 16
        for (int i = 0; i < rows; i++)
            finish_row(sum[i][0], sum[i][1], c + i * ldc, mask ? mask + i * ldc : NULL, &finish, finish.bias);
        return;
    }
    float sums[MR * NR]; /* the last columns fill no tile; a copy, since sums that a loop indexes would never be in registers */
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) store(sums + i * NR, sum[i][0]), store(sums + i * NR + W, sum[i][1]);
    const size_t bytes = columns * sizeof(float);
    for (int i = 0; i < rows; i++) {
        float result[NR], part[NR], bias[NR];
        memcpy(result, c + i * ldc, bytes);
        if (finish.bias) memcpy(bias, finish.bias, bytes);
        if (mask) memcpy(part, mask + i * ldc, bytes);
        const vec x0 = load(sums + i * NR), x1 = load(sums + i * NR + W);
        finish_row(x0, x1, result, mask ? part : NULL, &finish, finish.bias ? bias : NULL);
        memcpy(c + i * ldc, result, bytes);
    }
}

/* As many tiles of `rows` rows as there are. */
INLINE void tiles_of(const int rows, Strip *left, long rows_a, long next_a, long next_b)
{
    Strip s = *left; /* a copy, which no store to C can change */
    for (; s.rows >= rows; s.rows -= rows) {
        fetch(&s.ahead);
        tile(rows, &s, rows_a, next_a, next_b);
        s.a += rows * rows_a, s.c += rows * s.ldc;
        if (s.finish.mask) s.finish.mask += rows * s.ldc;
    }
    *left = s;
}

/* The compiler gets loops of their own for a packed panel, with an A whose rows or whose columns are dense. */
#define TILES(n)                                                                                          \
    static __attribute__((noinline)) void tiles_##n(Strip *s, long rows_a, long next_a, long next_b)      \
    {                                                                                                     \
        if (rows_a == 1 && next_b == NR) tiles_of(n, s, 1, next_a, NR);                                   \
        else if (next_a == 1 && next_b == NR) tiles_of(n, s, rows_a, 1, NR);                              \
        else tiles_of(n, s, rows_a, next_a, next_b);                                                      \
    }
TILES(MR)
TILES(4)
TILES(2)
TILES(1)

/* All rows of a strip. */
static void tiles(Strip strip, long rows_a, long next_a, long next_b)
{
    tiles_MR(&strip, rows_a, next_a, next_b);
    tiles_4(&strip, rows_a, next_a, next_b);
    tiles_2(&strip, rows_a, next_a, next_b);
    tiles_1(&strip, rows_a, next_a, next_b);
}

/* ---- packing -------------------------------------------------------------------------------------------------- */

/* Four rows of four numbers, `next` apart, to columns NR apart. */
INLINE void transpose4(const float *from, long next, float *to)
{
    vec4 a = *(const vec4 *)from, b = *(const vec4 *)(from + next);
    vec4 c = *(const vec4 *)(from + 2 * next), d = *(const vec4 *)(from + 3 * next);
    vec4 ab = SHUFFLE(a, b, 0, 4, 1, 5), cd = SHUFFLE(c, d, 0, 4, 1, 5);
    *(vec4 *)to = SHUFFLE(ab, cd, 0, 1, 4, 5);
    *(vec4 *)(to + NR) = SHUFFLE(ab, cd, 2, 3, 6, 7);
    ab = SHUFFLE(a, b, 2, 6, 3, 7), cd = SHUFFLE(c, d, 2, 6, 3, 7);
    *(vec4 *)(to + 2 * NR) = SHUFFLE(ab, cd, 0, 1, 4, 5);
    *(vec4 *)(to + 3 * NR) = SHUFFLE(ab, cd, 2, 3, 6, 7);
}

/* A panel of B: to[p NR + j] = b[p rows_b + j columns_b], zero behind the last column. */
static __attribute__((noinline)) void pack(float *to, long k, long columns, const float *b, long rows_b, long columns_b)
{
    long p = 0;
    if (columns == NR && columns_b == 1)
        for (; p < k; p++) {
            store(to + p * NR, load(b + p * rows_b));
            store(to + p * NR + W, load(b + p * rows_b + W));
        }
    else if (columns == NR && rows_b == 1)
        for (; p + 4 <= k; p += 4)
            for (int j = 0; j < NR; j += 4) transpose4(b + p + j * columns_b, columns_b, to + p * NR + j);
    for (; p < k; p++)
        for (long j = 0; j < NR; j++) to[p * NR + j] = j < columns ? b[p * rows_b + j * columns_b] : 0;
}

/* The lines of a panel, for tiles of `rows` rows of A to fetch. */
static Ahead panel_ahead(const float *b, long k, long columns, long rows_b, long columns_b, long rows)
{
    const long along = columns_b == 1 ? k : columns < NR ? columns : NR; /* rows of memory, and numbers in each */
    const long across = columns_b == 1 ? (columns < NR ? columns : NR) : k;
    const long lines = (across + LINE - 1) / LINE;
    return (Ahead){b, columns_b == 1 ? rows_b : columns_b, along, lines, 0, along * lines * MR / rows + 1};
}

/* ---- products ------------------------------------------------------------------------------------------------- */

/* c = A B, m x n, over k terms: a[i rows_a + p columns_a], b[p rows_b + j columns_b]; with `add` they are added to what c is; then
   bias, ReLU and mask. */
static void product(long m, long n, long k, const float *a, long rows_a, long columns_a, const float *b, long rows_b,
                    long columns_b, float *c, int add, const float *bias, int relu, const float *mask)
{
    float copy[KC * NR] __attribute__((aligned(64)));
    for (long p = 0; p < k; p += KC) {
        const long terms = k - p < KC ? k - p : KC;
        const int last = p + terms == k;
        for (long i = 0; i < m; i += MC) {
            const long rows = m - i < MC ? m - i : MC;
            for (long j = 0; j < n; j += NR) {
                const long columns = n - j < NR ? n - j : NR;
                const float *panel = b + p * rows_b + j * columns_b;
                long next = rows_b;
                const Ahead ahead = j + NR < n ? panel_ahead(panel + NR * columns_b, terms, n - j - NR, rows_b, columns_b, rows)
                                               : (Ahead){0};
                if (columns_b != 1 || columns < NR || rows > MR) { /* else one row of tiles reads it, where it lies */
                    pack(copy, terms, columns, panel, rows_b, columns_b);
                    panel = copy, next = NR;
                }
                Finish finish = {last && bias ? bias + j : NULL, last && mask ? mask + i * n + j : NULL, last && relu, add || p > 0};
                tiles((Strip){rows, columns, terms, a + i * rows_a + p * columns_a, panel, c + i * n + j, n, finish, ahead}, rows_a,
                      columns_a, next);
            }
        }
    }
}

/* c[i] = a[i] . b + bias, the product for a single output. */
static void dots(long m, long k, const float *a, const float *b, float bias, float *c)
{
    for (long i = 0; i < m; i++, a += k) {
        vec s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0};
        long p = 0;
        for (; p + 4 * W <= k; p += 4 * W) {
            s0 += load(a + p) * load(b + p);
            s1 += load(a + p + W) * load(b + p + W);
            s2 += load(a + p + 2 * W) * load(b + p + 2 * W);
            s3 += load(a + p + 3 * W) * load(b + p + 3 * W);
        }
        vec s = (s0 + s1) + (s2 + s3);
        float sum = bias;
        for (int j = 0; j < W; j++) sum += s[j];
        for (; p < k; p++) sum += a[p] * b[p];
        c[i] = sum;
    }
}

/* to[j] += sum over i of a[i][j]. */
static void sum_rows(long m, long n, const float *a, float *to)
{
    for (long i = 0; i < m; i++, a += n)
        for (long j = 0; j < n; j++) to[j] += a[j];
}
