/* GELU and layer normalisation of rows of numbers; `kernels.c` includes this behind its vectors of W numbers. */

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

INLINE float total(vec x)
{
    float sum = 0;
    for (int j = 0; j < W; j++) sum += x[j];
    return sum;
}

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

/* The gradient g by what a ReLU puts out, y, becomes that by what it takes in. */
INLINE void mask_row(long n, const float *restrict y, float *restrict g)
{
    for (long j = 0; j < n; j++) g[j] = y[j] <= 0 ? 0 : g[j];
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

/* The same for n numbers, a power of two that the compiler knows: what fills no vector would go through memory twice. */

enum { NARROW = 32 }; /* the largest n */

INLINE float halves(const int n, float *part)
{
    for (int half = n / 2; half; half /= 2)
        for (int j = 0; j < half; j++) part[j] += part[j + half];
    return part[0];
}

/* With ReLU. */
INLINE Moments narrow_norm(const int n, const float *restrict x, const float *restrict gain, const float *restrict offset,
                           float *restrict y)
{
    float part[NARROW], centred[NARROW];
    memcpy(part, x, n * sizeof(float));
    const float mean = halves(n, part) / n;
    for (int j = 0; j < n; j++) centred[j] = x[j] - mean, part[j] = centred[j] * centred[j];
    const float scale = 1 / __builtin_sqrtf(halves(n, part) / n + EPSILON);
    for (int j = 0; j < n; j++) {
        const float result = centred[j] * scale * gain[j] + offset[j];
        y[j] = result <= 0 ? 0 : result;
    }
    return (Moments){mean, scale};
}

INLINE void narrow_backward(const int n, const float *restrict x, Moments of, const float *restrict gain, float *restrict g,
                            float *restrict by_gain, float *restrict by_offset)
{
    float normed[NARROW], by[NARROW], sum[NARROW], along[NARROW];
    for (int j = 0; j < n; j++) {
        normed[j] = (x[j] - of.mean) * of.scale;
        by_gain[j] += g[j] * normed[j];
        by_offset[j] += g[j];
        sum[j] = by[j] = g[j] * gain[j];
        along[j] = by[j] * normed[j];
    }
    const float mean = halves(n, sum) / n, slope = halves(n, along) / n;
    for (int j = 0; j < n; j++) g[j] = (by[j] - mean - normed[j] * slope) * of.scale;
}
