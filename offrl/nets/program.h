/* A program: elementwise instructions and networks' passes, which one call from Python runs one after the other.

   An elementwise instruction computes out[i] from x[i], y[i], z[i] over up to four axes; a stride of 0 broadcasts. Each
   number is computed by one operation, as PyTorch computes it, so the two agree to the bit. SUM adds dense rows of
   sizes[3] numbers. */

enum { COPY, ADD, SUB, MUL, DIV, MINIMUM, MAXIMUM, ABS, GE, GT, LE, LT, WHERE, LERP, SUM, ADAM, NETWORK, GRADIENT }; /* as in program.py */

typedef struct {
    int64_t code;
    int64_t sizes[4];
    int64_t strides[4][4]; /* of out, x, y, z; in numbers */
    void *memory[5];       /* out, x, y, z; the arguments of a network's pass */
} Instruction;

/* What an instruction does to a row of n numbers; a, b stand for x[i], y[i]. NaNs pass, as in PyTorch. */
#define EACH(type, value)                                                                                               \
    do {                                                                                                                \
        type *o = out;                                                                                                  \
        if (to == 1 && by_x == 1 && by_y == 1)                                                                          \
            for (long i = 0; i < n; i++) {                                                                              \
                const float a = x[i], b = y[i];                                                                         \
                o[i] = value;                                                                                           \
            }                                                                                                           \
        else if (to == 1 && by_x == 1 && by_y == 0) {                                                                   \
            const float b = *y;                                                                                         \
            for (long i = 0; i < n; i++) {                                                                              \
                const float a = x[i];                                                                                   \
                o[i] = value;                                                                                           \
            }                                                                                                           \
        } else                                                                                                          \
            for (long i = 0; i < n; i++) {                                                                              \
                const float a = x[i * by_x], b = y[i * by_y];                                                           \
                o[i * to] = value;                                                                                      \
            }                                                                                                           \
    } while (0);                                                                                                        \
    break

static void row(int64_t code, long n, void *out, long to, const float *x, long by_x, const float *y, long by_y,
                const unsigned char *z, long by_z)
{
    switch (code) {
    case COPY:
        if (to == 1 && by_x == 1) {
            memmove(out, x, n * sizeof(float));
            return;
        }
        for (long i = 0; i < n; i++) ((float *)out)[i * to] = x[i * by_x];
        return;
    case WHERE:
        for (long i = 0; i < n; i++) ((float *)out)[i * to] = z[i * by_z] ? x[i * by_x] : y[i * by_y];
        return;
    case LERP: {
        const float weight = *(const float *)z;
        EACH(float, weight * (b - a) + a);
    }
    case ADD: EACH(float, a + b);
    case SUB: EACH(float, a - b);
    case MUL: EACH(float, a * b);
    case DIV: EACH(float, a / b);
    case MINIMUM: EACH(float, b < a || b != b ? b : a);
    case MAXIMUM: EACH(float, b > a || b != b ? b : a);
    case ABS: EACH(float, ((void)b, __builtin_fabsf(a)));
    case GE: EACH(unsigned char, a >= b);
    case GT: EACH(unsigned char, a > b);
    case LE: EACH(unsigned char, a <= b);
    case LT: EACH(unsigned char, a < b);
    }
}

static void elementwise(const Instruction *of)
{
    const int64_t *size = of->sizes, (*by)[4] = of->strides;
    const long width = of->code >= GE && of->code <= LT ? 1 : sizeof(float); /* bytes of a result */
    for (long i = 0; i < size[0]; i++)
        for (long j = 0; j < size[1]; j++)
            for (long k = 0; k < size[2]; k++) {
#define AT(t) (i * by[t][0] + j * by[t][1] + k * by[t][2])
                row(of->code, size[3], (char *)of->memory[0] + AT(0) * width, by[0][3], (float *)of->memory[1] + AT(1), by[1][3],
                    (float *)of->memory[2] + AT(2), by[2][3], (unsigned char *)of->memory[3] + AT(3), by[3][3]);
#undef AT
            }
}

/* ---- sums ----------------------------------------------------------------------------------------------------- */

/* PyTorch adds a row in this order (`SumKernel.cpp`): four vectors of eight side by side, or four numbers in a short row. Every
   so many go to a further level of sums, so that rounding grows slowly. program.py looks whether PyTorch does so here. */
enum { LANES = 8, SIDE = 4, LEVELS = 4 };
typedef float eight __attribute__((vector_size(4 * LANES), aligned(4)));

static float row_sum(const float *x, long n)
{
    if (n < LANES) {
        float s[SIDE] = {0};
        for (long i = 0; i < n; i++) s[i < n / SIDE * SIDE ? i % SIDE : 0] += x[i];
        return s[0] + s[1] + s[2] + s[3];
    }
    const long vectors = n / LANES, size = vectors / SIDE;
    long power = 0;
    while ((1L << power) < size) power++;
    power = power / LEVELS > 4 ? power / LEVELS : 4;
    const long step = 1L << power;
    eight acc[LEVELS][SIDE] = {{{0}}};
    long i = 0;
    while (i + step <= size) {
        for (long j = 0; j < step; j++, i++)
            for (int k = 0; k < SIDE; k++) acc[0][k] += *(const eight *)(x + (i * SIDE + k) * LANES);
        for (int level = 1; level < LEVELS; level++) {
            for (int k = 0; k < SIDE; k++) acc[level][k] += acc[level - 1][k], acc[level - 1][k] = (eight){0};
            if (i & ((step - 1) << (level * power))) break;
        }
    }
    for (; i < size; i++)
        for (int k = 0; k < SIDE; k++) acc[0][k] += *(const eight *)(x + (i * SIDE + k) * LANES);
    for (int level = 1; level < LEVELS; level++)
        for (int k = 0; k < SIDE; k++) acc[0][k] += acc[level][k];
    for (i = size * SIDE; i < vectors; i++) acc[0][0] += *(const eight *)(x + i * LANES);
    for (int k = 1; k < SIDE; k++) acc[0][0] += acc[0][k];
    float sum = 0;
    for (i = vectors * LANES; i < n; i++) sum += x[i];
    for (int j = 0; j < LANES; j++) sum += acc[0][0][j];
    return sum;
}

static void sums(const Instruction *of)
{
    const float *x = of->memory[1];
    for (long i = 0; i < of->sizes[2]; i++) ((float *)of->memory[0])[i] = row_sum(x + i * of->sizes[3], of->sizes[3]);
}

/* ---- the optimiser -------------------------------------------------------------------------------------------- */

typedef struct { /* an `Instruction` */
    int64_t code, n;
    double lr, beta1, beta2, weight_decay, eps;
    const float *rate; /* the learning rate in its place; NULL: it is lr */
    int64_t unused[13];
    float *parameter;
    const float *gradient;
    float *mean, *square;
    const float *count; /* steps, this one included */
} Adam;

/* One step of AdamW along numbers [from, to) of a tensor, in the order of PyTorch's fused operator (`FusedAdamKernel.cpp`): which
   products are joined with a sum is written out, since there it differs between whole vectors and the rest behind them. */
#define STEP(from, to, next_square)                                                                                     \
    for (long i = from; i < to; i++) {                                                                                  \
        const float g = gradient[i], by = by_square * g, at = p[i] * kept;                                              \
        m[i] = __builtin_fmaf(by_mean, g - m[i], m[i]);                                                                 \
        v[i] = next_square;                                                                                             \
        p[i] = at + step * m[i] / (sqrtf(v[i]) / root + eps);                                                           \
    }

#ifndef __clang__
__attribute__((optimize("fp-contract=off")))
#endif
static void adam(const Adam *of)
{
#ifdef __clang__
#pragma STDC FP_CONTRACT OFF
#endif
    const double lr = of->rate ? *of->rate : of->lr, count = *of->count;
    const float step = -(lr / (1 - pow(of->beta1, count))), root = sqrt(1 - pow(of->beta2, count));
    const float kept = 1 - lr * of->weight_decay, eps = of->eps, by_mean = 1 - of->beta1, by_square = 1 - of->beta2, old = of->beta2;
    float *restrict p = of->parameter, *restrict m = of->mean, *restrict v = of->square;
    const float *restrict gradient = of->gradient;
    const long whole = of->n / LANES * LANES;
    STEP(0, whole, __builtin_fmaf(by, g, v[i] * old))
    STEP(whole, of->n, __builtin_fmaf(v[i], old, by * g))
}

void run_program(const Instruction *of, int64_t count)
{
    for (; count > 0; count--, of++)
        if (of->code == NETWORK)
            mlp_forward(of->memory[0]);
        else if (of->code == GRADIENT)
            mlp_backward(of->memory[0], of->memory[1], of->memory[2], of->memory[3], of->memory[4]);
        else if (of->code == SUM)
            sums(of);
        else if (of->code == ADAM)
            adam((const Adam *)of);
        else
            elementwise(of);
}
