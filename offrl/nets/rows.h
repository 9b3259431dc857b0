/* GELU and layer normalisation of rows of numbers; `kernels.c` includes this behind its vectors of W numbers. */

/* x with the numbers of places j and j ^ h exchanged, and with the first number of each n in all places of the n. */
#if defined(__AVX512F__)
#define PLACES(OF, h) OF(0, h), OF(1, h), OF(2, h), OF(3, h), OF(4, h), OF(5, h), OF(6, h), OF(7, h), \
                      OF(8, h), OF(9, h), OF(10, h), OF(11, h), OF(12, h), OF(13, h), OF(14, h), OF(15, h)
#elif defined(__AVX__)
#define PLACES(OF, h) OF(0, h), OF(1, h), OF(2, h), OF(3, h), OF(4, h), OF(5, h), OF(6, h), OF(7, h)
#else
#define PLACES(OF, h) OF(0, h), OF(1, h), OF(2, h), OF(3, h)
#endif
#define OTHER(j, h) ((j) ^ (h) % W)
#define FIRST(j, n) ((j) / (n) * (n))
#ifdef __clang__
#define MOVED(x, OF, h) __builtin_shufflevector(x, x, PLACES(OF, h))
#else
#define MOVED(x, OF, h) __builtin_shuffle(x, (bits){PLACES(OF, h)})
#endif

/* In each place the sum over the n places around it, n = 4, 8, ... up to W. */
INLINE vec spread_sum(const int n, vec x)
{
    if (n >= 16) x += MOVED(x, OTHER, 8);
    if (n >= 8) x += MOVED(x, OTHER, 4);
    x += MOVED(x, OTHER, 2);
    x += MOVED(x, OTHER, 1);
    return x;
}

/* `yes` in the lanes of `where`, `no` in the others. */
INLINE vec choose(bits where, vec yes, vec no) { return (vec)((where & (bits)yes) | (~where & (bits)no)); }

/* ---- GELU ----------------------------------------------------------------------------------------------------- */

/* e^z for -88.3 < z <= 0, or NaN: z = n ln 2 + r with |r| <= ln 2 / 2, Taylor's polynomial of e^r (error 6e-9), times 2^n. */
INLINE vec exp_below_zero(vec z)
{
    const bits n = __builtin_convertvector(z * 1.44269504f - 0.5f, bits);
    const vec k = __builtin_convertvector(n, vec);
    const vec r = (z - k * (355 / 512.0f)) + k * 2.12194440e-4f; /* ln 2 in two parts: k times the first one is exact */
    const vec square = r * r;
    const vec low = (1 + r) + (0.5f + r * (1 / 6.0f)) * square; /* in pairs: a chain of eight would keep the next ones waiting */
    const vec high = (1 / 24.0f + r * (1 / 120.0f)) + (1 / 720.0f + r * (1 / 5040.0f)) * square;
    return (low + high * (square * square)) * (vec)((n + 127) << 23); /* 2^n by its exponent's bits; 0 for n = -127 */
}

/* x (1 + tanh u) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3), and its derivative.

   It is x s(2u), and the derivative is s(2u) + 2u' x s(2u) s(-2u), where s(v) = 1 / (1 + e^-v). Of u and -u the exponential
   is that of the negative one, so neither s loses digits nor anything overflows. Beyond |x| = 10.03 e^-2|u| counts as 0.
   The value's error is below 3 x 2^-24 |x|, the derivative's below 4 x 2^-24. */
INLINE vec gelu(vec x, vec *slope)
{
    const float far = 10.03f, twice = 1.59576912f, cubic = 0.044715f;
    const bits negative = x < 0;
    vec size = (vec)((bits)x & 0x7fffffff);
    size = choose(size > far, far - (vec){0}, size);
    const vec square = size * size;
    const vec e = exp_below_zero(size * -twice * (1 + cubic * square));
    const vec large = 1 / (1 + e), small = e * large; /* s(2|u|) and s(-2|u|) */
    const vec bend = size * twice * (1 + 3 * cubic * square) * large * small;
    *slope = choose(negative, small - bend, large + bend);
    return x * choose(negative, small, large);
}

/* A vector of a row that has `left` numbers from p on; where these are fewer than W, zeros follow. */
INLINE vec load_part(const float *p, long left)
{
    vec x = {0};
    if (left >= W) return load(p);
    memcpy(&x, p, left * sizeof(float));
    return x;
}

INLINE void store_part(float *p, vec x, long left)
{
    if (left >= W)
        store(p, x);
    else
        memcpy(p, &x, left * sizeof(float));
}

/* GELU in place; its derivatives go to `slopes` unless that is NULL. */
static void gelu_row(long n, float *x, float *slopes)
{
    vec slope; /* where nobody reads it the compiler leaves its arithmetic out */
    long j = 0;
    if (slopes)
        for (; j + W <= n; j += W) {
            store(x + j, gelu(load(x + j), &slope));
            store(slopes + j, slope);
        }
    else
        for (; j + W <= n; j += W) store(x + j, gelu(load(x + j), &slope));
    if (j == n) return;
    store_part(x + j, gelu(load_part(x + j, n - j), &slope), n - j);
    if (slopes) store_part(slopes + j, slope, n - j);
}

/* ---- layer normalisation -------------------------------------------------------------------------------------- */

#define EPSILON 1e-6f

typedef struct {
    float mean, scale; /* of a row; scale: 1 / sqrt(variance + epsilon) */
} Moments;

INLINE float total(vec x) { return spread_sum(W, x)[0]; }

/* Sum over j < n of x[j] - shift, or of the squares of these differences, in four sums that need not wait for each other. */
INLINE float sum_of(long n, const float *x, float shift, const int squares)
{
    vec sum[4] = {{0}};
    long j = 0;
    for (; j + 4 * W <= n; j += 4 * W)
        for (int k = 0; k < 4; k++) {
            const vec d = load(x + j + k * W) - shift;
            sum[k] += squares ? d * d : d;
        }
    float rest = total((sum[0] + sum[1]) + (sum[2] + sum[3]));
    for (; j < n; j++) rest += squares ? (x[j] - shift) * (x[j] - shift) : x[j] - shift;
    return rest;
}

static Moments moments_of(long n, const float *x)
{
    const float mean = sum_of(n, x, 0, 0) / n;
    return (Moments){mean, 1 / __builtin_sqrtf(sum_of(n, x, mean, 1) / n + EPSILON)};
}

/* y = gain (x - mean) scale + offset, then ReLU if wanted; y may be x. */
static void norm_row(long n, const float *x, Moments of, const float *gain, const float *offset, int relu, float *y)
{
    for (long j = 0; j < n; j += W) {
        const vec normed = (load_part(x + j, n - j) - of.mean) * of.scale;
        const vec result = normed * load_part(gain + j, n - j) + load_part(offset + j, n - j);
        store_part(y + j, relu ? where_positive(result, result) : result, n - j);
    }
}

/* The gradient g by a row of norm_row's results (before ReLU) becomes that by x; those by gain and offset grow, unless NULL. */
static void norm_row_backward(long n, const float *x, Moments of, const float *gain, float *g, float *by_gain, float *by_offset)
{
    vec sum = {0}, along = {0};
    for (long j = 0; j < n; j += W) {
        const vec normed = (load_part(x + j, n - j) - of.mean) * of.scale, by = load_part(g + j, n - j);
        if (by_gain) {
            store_part(by_gain + j, load_part(by_gain + j, n - j) + by * normed, n - j);
            store_part(by_offset + j, load_part(by_offset + j, n - j) + by, n - j);
        }
        sum += by * load_part(gain + j, n - j);
        along += by * load_part(gain + j, n - j) * normed;
    }
    const float mean = total(sum) / n, slope = total(along) / n;
    for (long j = 0; j < n; j += W) {
        const vec normed = (load_part(x + j, n - j) - of.mean) * of.scale;
        const vec by = load_part(g + j, n - j) * load_part(gain + j, n - j);
        store_part(g + j, (by - mean - normed * slope) * of.scale, n - j);
    }
}

/* ---- group normalisation of a row, with ReLU ------------------------------------------------------------------------ */

/* From a row's `numbers` x, in groups of n, to y; `kept` gets each group's moments. */
static void wide_groups(long n, long numbers, const float *x, const float *gain, const float *offset, float *y, Moments *kept)
{
    for (long j = 0; j < numbers; j += n, kept++) norm_row(n, x + j, *kept = moments_of(n, x + j), gain + j, offset + j, 1, y + j);
}

/* Of the gradient g by such a row y: that by x, in its place; those by gain and offset grow. */
static void wide_groups_backward(long n, long numbers, const float *x, const float *restrict y, const Moments *kept,
                                 const float *gain, float *restrict g, float *by_gain, float *by_offset)
{
    for (long j = 0; j < numbers; j++) g[j] = y[j] <= 0 ? 0 : g[j];
    for (long j = 0; j < numbers; j += n, kept++) norm_row_backward(n, x + j, *kept, gain + j, g + j, by_gain + j, by_offset + j);
}

/* Below, n is a power of two that the compiler knows: a vector holds several groups, or a group fills several vectors. Sums of
   groups end in all of their places, so nothing leaves the registers. */

enum { NARROW = 32, VECTORS = NARROW / W }; /* the largest n; vectors that it fills */

#define PARTS(n) ((n) > W ? (n) / W : 1)  /* vectors that are worked on at once */
#define AT_ONCE(n) ((n) > W ? (n) : W)    /* numbers in them */

/* In each place the mean over its group. The last step sees to it that a group's places agree to the bit: the compiler may fuse the
   first sum with the products in it, and then two places that add the same numbers round differently. */
INLINE vec group_mean(const int n, const vec *part)
{
    vec sum[VECTORS];
    for (int k = 0; k < PARTS(n); k++) sum[k] = part[k];
    for (int half = PARTS(n) / 2; half; half /= 2)
        for (int k = 0; k < half; k++) sum[k] += sum[k + half];
    const vec x = spread_sum(n > W ? W : n, sum[0] * (1.0f / n)); /* the factor is exact */
    return n >= W ? MOVED(x, FIRST, W) : n == 8 ? MOVED(x, FIRST, 8) : MOVED(x, FIRST, 4);
}

INLINE vec inverse_root(vec x)
{
    float root[W];
    store(root, x);
    for (int j = 0; j < W; j++) root[j] = 1 / __builtin_sqrtf(root[j]);
    return load(root);
}

/* As `wide_groups`. */
INLINE void narrow_groups(const int n, long numbers, const float *x, const float *gain, const float *offset, float *y,
                          Moments *kept)
{
    for (long j = 0; j < numbers; j += AT_ONCE(n)) {
        vec centred[VECTORS], square[VECTORS];
        for (int k = 0; k < PARTS(n); k++) centred[k] = load_part(x + j + k * W, numbers - j - k * W);
        const vec mean = group_mean(n, centred);
        for (int k = 0; k < PARTS(n); k++) centred[k] -= mean, square[k] = centred[k] * centred[k];
        const vec scale = inverse_root(group_mean(n, square) + EPSILON);
        for (int k = 0; k < PARTS(n); k++) {
            const long at = j + k * W, left = numbers - at;
            const vec result = centred[k] * scale * load_part(gain + at, left) + load_part(offset + at, left);
            store_part(y + at, where_positive(result, result), left);
        }
        for (int of = 0; of < W && j + of < numbers; of += n) *kept++ = (Moments){mean[of], scale[of]};
    }
}

/* As `wide_groups_backward`. */
INLINE void narrow_groups_backward(const int n, long numbers, const float *x, const float *y, const Moments *kept,
                                   const float *gain, float *g, float *by_gain, float *by_offset)
{
    for (long j = 0; j < numbers; j += AT_ONCE(n)) {
        vec mean = {0}, scale = {0}, normed[VECTORS], by[VECTORS], along[VECTORS];
        for (int of = 0; of < W && j + of < numbers; of += n, kept++)
            for (int i = of; i < of + n && i < W; i++) mean[i] = kept->mean, scale[i] = kept->scale;
        for (int k = 0; k < PARTS(n); k++) {
            const long at = j + k * W, left = numbers - at;
            const vec from = where_positive(load_part(g + at, left), load_part(y + at, left));
            normed[k] = (load_part(x + at, left) - mean) * scale;
            store_part(by_gain + at, load_part(by_gain + at, left) + from * normed[k], left);
            store_part(by_offset + at, load_part(by_offset + at, left) + from, left);
            by[k] = from * load_part(gain + at, left);
            along[k] = by[k] * normed[k];
        }
        const vec shift = group_mean(n, by), slope = group_mean(n, along);
        for (int k = 0; k < PARTS(n); k++)
            store_part(g + j + k * W, (by[k] - shift - normed[k] * slope) * scale, numbers - j - k * W);
    }
}
