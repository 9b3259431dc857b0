/* Forward and backward passes of batched Linear-...-Linear networks in float32, with ReLU or GELU and layer normalisation
   between the layers; `kernels.py` compiles and calls this.

   A product C = A B is computed in tiles of MR rows by NR columns whose sums stay in registers. NR columns of B at a time
   are first copied into a dense panel, which the inner loop reads from the nearest cache; A is read where it lies. Bias,
   ReLU and the backward pass's mask are applied while a tile is in registers. (Goto & van de Geijn, "Anatomy of
   high-performance matrix multiplication", ACM TOMS 2008.) GELU and layer normalisation, in rows.h, go over finished
   rows, each of which stays in the nearest cache meanwhile. An update's numbers don't fit into the second cache, so a tile asks
   for what the next ones will read (`__builtin_prefetch`): a hint, which changes no number.

   Each sum runs over its terms in the same order whatever the tile, so a number does not depend on the rows beside it.
   Matrices are row-major and dense; a network's arrays follow those of the network before it. */

#include <math.h>
#include <stdint.h>
#include <stddef.h>
#include <string.h>

#if defined(__AVX512F__)
enum { W = 16, MR = 12 }; /* numbers in a vector, rows in a tile: MR x 2 sums fill most of the registers */
#elif defined(__AVX__)
enum { W = 8, MR = 6 };
#else
enum { W = 4, MR = 6 };
#endif
enum { NR = 2 * W, KC = 256, MC = 264 }; /* columns of a tile; terms and rows of A that stay in the cache */
enum { LINE = 16 };                      /* numbers that a cache fetches at once */

typedef float vec __attribute__((vector_size(4 * W), aligned(4)));
typedef int bits __attribute__((vector_size(4 * W), aligned(4)));
typedef float vec4 __attribute__((vector_size(16), aligned(4)));
typedef int index4 __attribute__((vector_size(16)));

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (index4){__VA_ARGS__})
#endif

#define INLINE static inline __attribute__((always_inline))

INLINE vec load(const float *p) { return *(const vec *)p; }
INLINE void store(float *p, vec x) { *(vec *)p = x; }

/* x where `by` is above 0, else 0; a NaN in `by` lets x pass, as in PyTorch. */
INLINE vec where_positive(vec x, vec by) { return (vec)((bits)x & ~(bits)(by <= 0)); }

#include "products.h"
#include "rows.h"

/* ---- networks ------------------------------------------------------------------------------------------------- */

enum { MOST_LAYERS = 16 };
enum { BLOCK = KC }; /* rows that go through all layers before the next ones: what lies between two layers stays in the cache */
enum { NO_NORM, NORM_FIRST, NORM_AFTER }; /* layer normalisation of the hidden layers: before the ReLU, or after ReLU or GELU */

typedef struct {
    int64_t nets, batch, layers;
    int64_t step; /* distance of two networks in the parameters' arrays, in networks */
    int64_t gelu; /* GELU instead of ReLU; not with NORM_FIRST */
    int64_t norm;
    int64_t sizes[MOST_LAYERS + 1];
    float *x;         /* [nets, batch, sizes[0]] */
    int64_t kept; /* whether `hidden` has room for all rows, and not for one block of one network */
    float *hidden;    /* what the hidden layers put out, [nets, batch, width] each, one behind the other */
    float *unnormed;  /* what their normalisation takes in, likewise; NULL: none, or not kept */
    float *slopes;    /* derivatives of their GELUs, likewise; NULL: none, or not kept */
    Moments *moments; /* of their normalised rows, [nets, batch] each; NULL: none, or not kept */
    float *out;       /* [nets, batch, last width] */
    /* weight [.., out, in] and bias [.., out] of each layer; then, with a norm, gain and offset [.., width] of each hidden one */
    float *parameters[4 * MOST_LAYERS];
} Network;

typedef struct {
    long i, first, rows; /* of network i the rows from `first` on */
} Block;

static Block block(const Network *net, long i, long first)
{
    return (Block){i, first, net->batch - first < BLOCK ? net->batch - first : BLOCK};
}

static Block next(const Network *net, Block at)
{
    const long first = at.first + BLOCK;
    return first < net->batch ? block(net, at.i, first) : block(net, at.i + 1, 0);
}

/* A block's input of layer `layer` (0, 1, ...), in an array like `hidden` unless it is the network's own. */
static float *input_of(const Network *net, float *hidden, long layer, Block at)
{
    const long before = at.i * net->batch + at.first;
    if (layer == 0) return net->x + before * net->sizes[0];
    for (long l = 1; l < layer; l++) hidden += net->nets * net->batch * net->sizes[l];
    return hidden + before * net->sizes[layer];
}

/* The same in memory that has room for one block. */
static float *block_of(const Network *net, float *memory, long layer)
{
    for (long l = 1; l < layer; l++) memory += BLOCK * net->sizes[l];
    return memory;
}

static const float *weight_of(const Network *net, long layer, long i)
{
    return net->parameters[2 * layer] + i * net->step * net->sizes[layer] * net->sizes[layer + 1];
}

/* Place of a hidden layer's gain among the parameters; its offset follows. */
static long gain_of(const Network *net, long layer) { return 2 * net->layers + 2 * layer; }

static int relu_is_last(const Network *net) { return !net->gelu && net->norm != NORM_AFTER; }

/* GELU and normalisation of hidden layer `layer`: from `sums`, which change, to y, which may be the same memory. */
static void between(const Network *net, long layer, Block at, float *sums, float *y)
{
    const long width = net->sizes[layer + 1], behind = at.i * net->step * width;
    const float *gain = net->norm ? net->parameters[gain_of(net, layer)] + behind : NULL;
    const float *offset = net->norm ? net->parameters[gain_of(net, layer) + 1] + behind : NULL;
    float *slopes = net->slopes ? input_of(net, net->slopes, layer + 1, at) : NULL;
    Moments *kept = net->moments ? net->moments + (layer * net->nets + at.i) * net->batch + at.first : NULL;
    for (long row = 0; row < at.rows; row++, sums += width, y += width) {
        if (net->gelu) gelu_row(width, sums, slopes ? slopes + row * width : NULL);
        if (!net->norm) continue;
        const Moments of = moments_of(width, sums);
        norm_row(width, sums, of, gain, offset, net->norm == NORM_FIRST, y);
        if (kept) kept[row] = of;
    }
}

/* g, the gradient by what a hidden layer puts out (before its ReLU, where that is last), becomes that by its sums. */
static void between_backward(const Network *net, long layer, Block at, float *g, float *const *by_parameters)
{
    const long width = net->sizes[layer + 1], place = gain_of(net, layer);
    float *by_gain = net->norm && by_parameters ? by_parameters[place] + at.i * width : NULL;
    float *by_offset = net->norm && by_parameters ? by_parameters[place + 1] + at.i * width : NULL;
    for (long row = 0; row < at.rows; row++, g += width) {
        if (net->norm) {
            const float *x = input_of(net, net->unnormed, layer + 1, at) + row * width;
            const float *gain = net->parameters[place] + at.i * net->step * width;
            const Moments of = net->moments[(layer * net->nets + at.i) * net->batch + at.first + row];
            norm_row_backward(width, x, of, gain, g, by_gain, by_offset);
            for (long j = 0; j < width && net->norm == NORM_AFTER && !net->gelu; j++) g[j] = x[j] <= 0 ? 0 : g[j];
        }
        const float *slopes = net->gelu ? input_of(net, net->slopes, layer + 1, at) + row * width : NULL;
        for (long j = 0; j < width && slopes; j++) g[j] *= slopes[j];
    }
}

static void forward(const Network *net, Block at)
{
    for (long l = 0; l < net->layers; l++) {
        const long in = net->sizes[l], width = net->sizes[l + 1], last = l == net->layers - 1;
        const float *a = l && !net->kept ? block_of(net, net->hidden, l) : input_of(net, net->hidden, l, at);
        const float *bias = net->parameters[2 * l + 1] + at.i * net->step * width;
        float *y = net->kept ? input_of(net, net->hidden, l + 1, at) : block_of(net, net->hidden, l + 1);
        if (last) y = net->out + (at.i * net->batch + at.first) * width;
        float *sums = last || !net->unnormed ? y : input_of(net, net->unnormed, l + 1, at);
        const int relu = !last && !net->gelu && net->norm != NORM_FIRST;
        if (width == 1 && last)
            dots(at.rows, in, a, weight_of(net, l, at.i), *bias, y);
        else
            product(at.rows, width, in, a, in, 1, weight_of(net, l, at.i), 1, in, sums, 0, bias, relu, NULL);
        if (!last && (net->gelu || net->norm)) between(net, l, at, sums, y);
    }
}

static void backward(const Network *net, Block at, const float *by_out, float *by_hidden, float *by_x, float *const *by_parameters)
{
    for (long l = net->layers - 1; l >= 0; l--) {
        const long in = net->sizes[l], width = net->sizes[l + 1], before = at.i * net->batch + at.first;
        const float *x = input_of(net, net->hidden, l, at);
        const float *g = l == net->layers - 1 ? by_out + before * width : block_of(net, by_hidden, l + 1);
        if (by_parameters) {
            float *by_weight = by_parameters[2 * l] + at.i * width * in;
            product(width, in, at.rows, g, 1, width, x, in, 1, by_weight, at.first > 0, NULL, 0, NULL);
            sum_rows(at.rows, width, g, by_parameters[2 * l + 1] + at.i * width);
        }
        float *c = l ? block_of(net, by_hidden, l) : by_x ? by_x + before * in : NULL;
        const float *mask = l && relu_is_last(net) ? x : NULL;
        if (c) product(at.rows, in, width, g, width, 1, weight_of(net, l, at.i), in, 1, c, 0, NULL, 0, mask);
        if (l && (net->gelu || net->norm)) between_backward(net, l - 1, at, c, by_parameters);
    }
}

/* The gradients that are sums over rows, other than the weights', begin at 0. */
static void clear(const Network *net, float *const *by_parameters)
{
    for (long l = 0; l < net->layers; l++) {
        const size_t bytes = net->nets * net->sizes[l + 1] * sizeof(float);
        memset(by_parameters[2 * l + 1], 0, bytes);
        for (long k = 0; k < 2 && net->norm && l < net->layers - 1; k++) memset(by_parameters[gain_of(net, l) + k], 0, bytes);
    }
}

/* Fill `hidden` and `out`, and what else there is to keep for the backward pass. */
void mlp_forward(const Network *net)
{
    for (Block at = block(net, 0, 0); at.i < net->nets; at = next(net, at)) forward(net, at);
}

/* Gradients from that of the output, by_out, and from what the forward pass kept.

   by_hidden: memory for a block's gradients by the hidden layers' sums, [BLOCK, width] each.
   by_x: shaped like x, or NULL: not wanted. by_parameters: dense arrays in the order of `parameters`, or NULL. */
void mlp_backward(const Network *net, const float *by_out, float *by_hidden, float *by_x, float *const *by_parameters)
{
    if (by_parameters) clear(net, by_parameters);
    for (Block at = block(net, 0, 0); at.i < net->nets; at = next(net, at))
        backward(net, at, by_out, by_hidden, by_x, by_parameters);
}

/* c = A B + bias, m x n over k terms; c is dense, rows of A and B may overlap. bias: n numbers, or NULL. */
void multiply(int64_t m, int64_t n, int64_t k, const float *a, int64_t rows_a, int64_t columns_a, const float *b, int64_t rows_b,
              int64_t columns_b, float *c, const float *bias)
{
    product(m, n, k, a, rows_a, columns_a, b, rows_b, columns_b, c, 0, bias, 0, NULL);
}

/* NARROW with a width that the compiler knows, where there is one for it, else WIDE; both get the width and the other arguments. */
#define BY_WIDTH(width, NARROW, WIDE, ...)                                                                              \
    if (width == 4) NARROW(4, __VA_ARGS__);                                                                             \
    else if (width == 8) NARROW(8, __VA_ARGS__);                                                                        \
    else if (width == 16) NARROW(16, __VA_ARGS__);                                                                      \
    else if (width == 32) NARROW(32, __VA_ARGS__);                                                                      \
    else WIDE(width, __VA_ARGS__)

/* Group normalisation of each of `rows` rows, of groups x width numbers, and ReLU: from x to y. */
void norm_forward(int64_t rows, int64_t groups, int64_t width, const float *x, const float *gain, const float *offset, float *y,
                  Moments *kept)
{
    const long numbers = groups * width;
    for (long i = 0; i < rows; i++, x += numbers, y += numbers, kept += groups)
        BY_WIDTH(width, narrow_groups, wide_groups, numbers, x, gain, offset, y, kept);
}

/* Of the gradient g by y: that by x, in its place; those by gain and offset. */
void norm_backward(int64_t rows, int64_t groups, int64_t width, const float *x, const float *y, const Moments *kept,
                   const float *gain, float *g, float *by_gain, float *by_offset)
{
    const long numbers = groups * width;
    memset(by_gain, 0, numbers * sizeof(float));
    memset(by_offset, 0, numbers * sizeof(float));
    for (long i = 0; i < rows; i++, x += numbers, y += numbers, g += numbers, kept += groups)
        BY_WIDTH(width, narrow_groups_backward, wide_groups_backward, numbers, x, y, kept, gain, g, by_gain, by_offset);
}

#include "recurrent.h"
#include "program.h"
#include "codes.h"
