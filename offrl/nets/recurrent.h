/* A gated recurrent unit over whole sequences, and its gradient; `kernels.c` includes this, and `recurrent.py` calls it.

       r = s(x_r + W_r h + b_r),  u = s(x_u + W_u h + b_u),  c = tanh(x_c + r (W_c h + b_c)),  h <- (1 - u) c + u h,

   from h = 0. All arrays are in order of time, so that the sequences of one timestep are one matrix. The weights are packed once
   and serve all timesteps. */

/* e^z for z <= 0, or NaN; numbers below e^-88 count as it. */
INLINE vec exp_of_negative(vec z) { return exp_below_zero(choose(z < -88.0f, (vec){0} - 88.0f, z)); }

INLINE vec size_of(vec x) { return (vec)((bits)x & 0x7fffffff); }

/* 1 / (1 + e^-x); the exponential is that of a negative number, so nothing overflows. */
INLINE vec sigmoid(vec x)
{
    const vec e = exp_of_negative(-size_of(x)), large = 1 / (1 + e);
    return choose(x < 0, e * large, large);
}

/* Its error is below 2^-23, relative to 1 and not to the result, whose digits cancel near 0. */
INLINE vec tanh_of(vec x)
{
    const vec e = exp_of_negative(-2 * size_of(x)), large = (1 - e) / (1 + e);
    return choose(x < 0, -large, large);
}

/* The panels of B, k x n, one behind the other. */
static void pack_all(float *to, long k, long n, const float *b, long rows_b, long columns_b)
{
    for (long j = 0; j < n; j += NR) pack(to + j * k, k, n - j < NR ? n - j : NR, b + j * columns_b, rows_b, columns_b);
}

/* c = A B + bias, or c += A B without a bias, of dense matrices and the panels of B. */
static void times_packed(long m, long n, long k, const float *a, const float *panels, float *c, const float *bias)
{
    for (long j = 0; j < n; j += NR) {
        const Finish finish = {bias ? bias + j : NULL, NULL, 0, bias == NULL};
        tiles((Strip){m, n - j < NR ? n - j : NR, k, a, panels + j * k, c + j, n, finish, {0}}, k, 1, NR);
    }
}

/* What one timestep of one sequence computes, a row of `width` numbers each; `gates` gets r, u, c and W_c h + b_c. */
static void advance_row(long width, const float *x, const float *own, const float *before, float *gates, float *after)
{
    for (long j = 0; j < width; j += W) {
        const long left = width - j, u = width + j, c = 2 * width + j;
        const vec reset = sigmoid(load_part(x + j, left) + load_part(own + j, left));
        const vec update = sigmoid(load_part(x + u, left) + load_part(own + u, left));
        const vec sum = load_part(own + c, left);
        const vec new = tanh_of(load_part(x + c, left) + reset * sum);
        const vec old = before ? load_part(before + j, left) : (vec){0};
        store_part(after + j, (1 - update) * new + update * old, left);
        if (!gates) continue;
        store_part(gates + j, reset, left);
        store_part(gates + u, update, left);
        store_part(gates + c, new, left);
        store_part(gates + c + width, sum, left);
    }
}

/* From g, the gradient by `after`: those by x and by W h + b; and g becomes the part of that by `before` that does not go
   through the weights. */
static void advance_row_backward(long width, const float *gates, const float *before, float *g, float *by_x, float *by_own)
{
    for (long j = 0; j < width; j += W) {
        const long left = width - j, u = width + j, c = 2 * width + j;
        const vec reset = load_part(gates + j, left), update = load_part(gates + u, left);
        const vec new = load_part(gates + c, left), sum = load_part(gates + c + width, left);
        const vec old = before ? load_part(before + j, left) : (vec){0}, by = load_part(g + j, left);
        const vec by_new = by * (1 - update) * (1 - new * new);
        const vec by_update = by * (old - new) * update * (1 - update);
        const vec by_reset = by_new * sum * reset * (1 - reset);
        store_part(by_x + j, by_reset, left);
        store_part(by_x + u, by_update, left);
        store_part(by_x + c, by_new, left);
        store_part(by_own + j, by_reset, left);
        store_part(by_own + u, by_update, left);
        store_part(by_own + c, by_new * reset, left);
        store_part(g + j, by * update, left);
    }
}

/* x: [nets, steps, batch, 3 width]; weight: [nets, 3 width, width] and bias: [nets, 3 width] of r, u and c.

   gates: [nets, steps, batch, 4 width] for the backward pass, or NULL; memory: [nets, steps, batch, width], h after each step;
   scratch: 3 width (width + NR) + 3 batch width numbers. */
void gru_forward(int64_t nets, int64_t steps, int64_t batch, int64_t width, const float *x, const float *weight,
                 const float *bias, float *gates, float *memory, float *scratch)
{
    float *panels = scratch, *own = scratch + 3 * width * (width + NR);
    for (long i = 0; i < nets; i++, weight += 3 * width * width, bias += 3 * width) {
        pack_all(panels, width, 3 * width, weight, 1, width);
        for (long t = 0; t < steps; t++) {
            const float *before = t ? memory - batch * width : NULL;
            if (t) times_packed(batch, 3 * width, width, before, panels, own, bias);
            for (long row = 0; row < batch; row++, x += 3 * width, memory += width) {
                advance_row(width, x, t ? own + row * 3 * width : bias, t ? before + row * width : NULL, gates, memory);
                if (gates) gates += 4 * width;
            }
        }
    }
}

/* Gradients from that of the memories, by_memory, which is written over; scratch: 3 width (width + NR) + 3 steps batch width. */
void gru_backward(int64_t nets, int64_t steps, int64_t batch, int64_t width, const float *weight, const float *gates,
                  const float *memory, float *by_memory, float *by_x, float *by_weight, float *by_bias, float *scratch)
{
    const long rows = batch * width, all = steps * rows;
    float *panels = scratch, *by_own = scratch + 3 * width * (width + NR);
    memset(by_weight, 0, nets * 3 * width * width * sizeof(float));
    memset(by_bias, 0, nets * 3 * width * sizeof(float));
    for (long i = 0; i < nets; i++) {
        pack_all(panels, 3 * width, width, weight + i * 3 * width * width, width, 1);
        for (long t = steps - 1; t >= 0; t--) {
            const long at = i * all + t * rows;
            const float *before = t ? memory + at - rows : NULL;
            for (long row = 0; row < batch; row++) {
                const long of = at + row * width;
                advance_row_backward(width, gates + 4 * of, before ? before + row * width : NULL, by_memory + of, by_x + 3 * of,
                                     by_own + 3 * (of - i * all));
            }
            if (!t) break;
            /* The gradient by h before this step: what the rows left, and what goes through the weights. */
            times_packed(batch, width, 3 * width, by_own + 3 * t * rows, panels, by_memory + at, NULL);
            for (long j = 0; j < rows; j++) by_memory[at - rows + j] += by_memory[at + j];
        }
        sum_rows(steps * batch, 3 * width, by_own, by_bias + i * 3 * width);
        product(3 * width, width, (steps - 1) * batch, by_own + 3 * rows, 1, 3 * width, memory + i * all, width, 1,
                by_weight + i * 3 * width * width, 0, NULL, 0, NULL);
    }
}
