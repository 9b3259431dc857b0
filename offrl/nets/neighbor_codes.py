"""7-bit codes of a dataset's states and actions, which rule rows out of a search at a fraction of a distance's cost.

A coordinate y becomes the whole number nearest to (y - centre) / step, between -64 and 63; all actions have one step, all
states another. Cutting coordinates off brings no two points further apart, and rounding moves a point by the length r of its
residual, so the distance of two points is at least that of their codes less both residuals. With x a row's codes, q a query's,
u = x + 64, and w the weight of a squared step (step^2 for actions, beta^2 step^2 for states),

    |x - q|^2 = |x|^2 - 2 (u . q - 64 sum q) + |q|^2.

The codes of every row within R are within R + r_x + r_q of the query's, that is, where w weighs and "sum" adds up actions and
states,

    sum w (u . q - |x|^2 / 2)  >=  (sum w (|q|^2 + 128 sum q) - (R + r_x + r_q)^2) / 2.

The products u . q are of bytes, of which a processor adds up 64 in one instruction (`codes.h`); |x|^2 / 2 is rounded down.
What passes is measured in float64, so codes change no answer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from offrl.nets import kernels

Array = Any  # a NumPy array; Numba wants no type from us

WIDTH = 64  # rows in a leaf, as in codes.h
LINE = 64  # bytes that a processor's cache holds together
_LEAST, _MOST = -64, 63
_SPREAD = 3.0  # standard deviations of a state's coordinates to either side that the codes tell apart
_NO_ROW = -(1 << 28)  # start of padding: no row, and far from everything
_LARGEST = 127 * 64 + 64 * 64 // 2  # of a dimension's share in a sum, without sign
_ROUNDING = 1e-6  # relative error of a sum of two float32 products, generously


class Codes(NamedTuple):
    """Arrays and numbers of the codes of rows that stand by leaves.

    Attributes:
        rows: `[M, G, W, 4]` uint8, u of each leaf: groups of four dimensions, first those of actions, then those of states.
        starts: `[M, 2, W]` int32, -|x|^2 / 2 of actions and of states, rounded up.
        centres: `[A + S]` float64; steps: `[2]` float64, of actions and states.
        residuals: `[2]` float64, the largest |r| of a row's action and of its state, in steps.
        function: address of the compiled `close_rows`; 0 where there is no compiler.
    """

    rows: Array
    starts: Array
    centres: Array
    steps: Array
    residuals: Array
    function: int


def make_codes(states: Array, actions: Array) -> Codes:
    """Codes of rows in the order of their places: `[N, S]` and `[N, A]` float32."""
    n, split = len(states), actions.shape[1]
    leaves = -(-n // WIDTH)
    groups = groups_of(split) + groups_of(states.shape[1])
    rows = np.full((leaves * WIDTH, 4 * groups), -_LEAST, np.uint8)
    starts = np.full((leaves * WIDTH, 2), _NO_ROW, np.int32)
    centres, steps, residuals = _centres(states, actions), _steps(states, actions), np.zeros(2)
    for first in range(0, n, 65_536):  # bounds the memory of the float64 copies
        last = min(first + 65_536, n)
        for part, (values, centre) in enumerate(((actions, centres[:split]), (states, centres[split:]))):
            exact = np.clip((values[first:last].astype(np.float64) - centre) / steps[part], _LEAST, _MOST)
            codes = np.rint(exact)
            column = part * 4 * groups_of(split)
            rows[first:last, column : column + values.shape[1]] = codes - _LEAST
            starts[first:last, part] = -((codes * codes).sum(1) // 2)
            residuals[part] = max(residuals[part], float(np.sqrt(np.square(codes - exact).sum(1)).max()))
    rows_by_leaf = aligned(rows.reshape(leaves, WIDTH, groups, 4).transpose(0, 2, 1, 3))
    starts_by_leaf = aligned(starts.reshape(leaves, WIDTH, 2).transpose(0, 2, 1))
    return Codes(rows_by_leaf, starts_by_leaf, centres, steps, residuals, kernels.address("close_rows"))


def aligned(x: Array) -> Array:
    """A dense copy that begins on a line of the cache: no vector of it then lies in two."""
    memory = np.empty(x.nbytes + LINE, np.uint8)
    start = -memory.ctypes.data % LINE
    copy = memory[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    copy[...] = x
    return copy


@njit(nogil=True, cache=True)
def groups_of(width: int) -> int:
    """Groups of four dimensions that `width` ones fill."""
    return (width + 3) // 4


def _centres(states: Array, actions: Array) -> Array:
    middle = (actions.min(0).astype(np.float64) + actions.max(0)) / 2
    return np.concatenate([middle, states.mean(0, dtype=np.float64)])


def _steps(states: Array, actions: Array) -> Array:
    """Actions: their whole range. States: `_SPREAD` standard deviations, the root mean square over dimensions."""
    widest = float(np.ptp(actions, axis=0).max()) if actions.shape[1] else 0.0
    spread = 2 * _SPREAD * float(np.sqrt(np.mean(states.var(0, dtype=np.float64))))
    return np.array([whole / (_MOST - _LEAST) if whole > 0 else 1.0 for whole in (widest, spread)])


@njit(nogil=True, cache=True)
def encode(codes: Codes, actions: Array, states: Array, betas: Array, asked: Array, terms: Array) -> None:
    """Fill the codes `[Q, 4 G]` int8 of queries, and what a comparison needs besides, `terms`: `[Q, 5]` float64.

    Terms: weights of actions and of states, the right side's sum, r_x + r_q, and what float32 may lose.
    """
    split = actions.shape[1]
    for q in range(len(betas)):
        asked[q] = 0
        moved = 0.0
        terms[q] = 0.0
        for part in range(2):
            values = actions[q] if part == 0 else states[q]
            centre = 0 if part == 0 else split
            column = 0 if part == 0 else 4 * groups_of(split)
            weight = (codes.steps[part] * (1.0 if part == 0 else betas[q])) ** 2
            total, residual = 0.0, 0.0
            for d in range(len(values)):
                exact = (np.float64(values[d]) - codes.centres[centre + d]) / codes.steps[part]
                exact = min(max(exact, float(_LEAST)), float(_MOST))
                code = np.rint(exact)
                asked[q, column + d] = np.int8(code)
                total += code * code - 2 * _LEAST * code
                residual += (code - exact) ** 2
            terms[q, part] = weight
            terms[q, 2] += weight * total
            terms[q, 3] += weight * codes.residuals[part] ** 2
            moved += weight * residual
            terms[q, 4] += _ROUNDING * weight * len(values) * _LARGEST
        terms[q, 3] = (np.sqrt(terms[q, 3]) + np.sqrt(moved)) * (1 + _ROUNDING)
        terms[q, 4] += _ROUNDING * abs(terms[q, 2])


def _typed_call(
    context: Any, address: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any, h: Any, i: Any, j: Any
) -> Any:
    """Call the function at an address, which takes ten numbers or pointers of 64 bits and returns a number."""

    def code(_: Any, builder: Any, signature: Any, values: Any) -> Any:
        word = ir.IntType(64)
        function = builder.inttoptr(values[0], ir.FunctionType(word, [word] * 10).as_pointer())
        return builder.call(function, values[1:])

    return types.int64(types.int64, *[types.int64] * 10), code


_call: Any = intrinsic(_typed_call)


def _typed_borrowed(context: Any, value: Any) -> Any:
    """An array, or a tuple of arrays and others, without the arrays' owners: for use while somebody else holds them.

    Numba counts each slice, and each array taken out of a tuple, by atomic instructions on its owner; in a search, which slices
    for every pair of a query and a leaf, these would take more time than the distances.
    """

    def code(compiler: Any, builder: Any, signature: Any, values: Any) -> Any:
        return _without_owners(compiler, builder, signature.args[0], values[0])

    return value(value), code


def _without_owners(compiler: Any, builder: Any, kind: Any, value: Any) -> Any:
    if isinstance(kind, types.BaseTuple):
        kinds: Any = kind  # a tuple type goes through its parts' types
        parts = [builder.extract_value(value, i) for i in range(len(kinds))]
        bare = [_without_owners(compiler, builder, of, part) for of, part in zip(kinds, parts, strict=True)]
        return compiler.make_tuple(builder, kind, bare)
    if not isinstance(kind, types.Array):
        return value
    array = compiler.make_array(kind)(compiler, builder, value=value)
    for owner in ("meminfo", "parent"):
        setattr(array, owner, getattr(array, owner).type(None))
    return array._getvalue()


borrowed: Any = intrinsic(_typed_borrowed)


@njit(nogil=True, cache=True, forceinline=True)
def close_rows(
    codes: Codes,
    leaf: int,
    split: int,
    asked: Array,
    terms: Array,
    limits: Array,
    callers: Array,
    count: int,
    pairs: Array,
) -> int:
    """Fill `pairs` with the rows of a leaf that may lie within the limits of its callers.

    Args:
        split: number of the groups of actions; asked, terms: see `encode`; limits: `[Q]` float32, squared distances.
        callers: `[Q]` int32, of which the first `count` are numbers of queries.
        pairs: `[Q W, 2]` int32: query and row.

    Returns:
        the number of pairs. Every row within a limit is among them, and few others.
    """
    rows, starts = codes.rows[leaf], codes.starts[leaf]
    if codes.function != 0:
        return _call(
            codes.function,
            rows.ctypes.data,
            starts.ctypes.data,
            split,
            len(rows),
            asked.ctypes.data,
            terms.ctypes.data,
            limits.ctypes.data,
            callers.ctypes.data,
            count,
            pairs.ctypes.data,
        )
    return plain_close_rows(rows, starts, split, asked, terms, limits, callers, count, pairs)


@njit(nogil=True, cache=True)
def plain_close_rows(
    rows: Array,
    starts: Array,
    split: int,
    asked: Array,
    terms: Array,
    limits: Array,
    callers: Array,
    count: int,
    pairs: Array,
) -> int:
    """What `close_rows` in codes.h does, where there is no compiler."""
    found = 0
    sums = np.empty((2, WIDTH), np.int32)
    for c in range(count):
        q = callers[c]
        far = np.sqrt(np.float64(limits[q])) + terms[q, 3]
        least = (terms[q, 2] - far * far * (1 + _ROUNDING)) / 2 - terms[q, 4]
        sums[:] = starts
        for g in range(len(rows)):
            part = 0 if g < split else 1
            for i in range(4):
                code = np.int32(asked[q, 4 * g + i])
                for p in range(WIDTH):
                    sums[part, p] += np.int32(rows[g, p, i]) * code
        for p in range(WIDTH):
            if terms[q, 0] * sums[0, p] + terms[q, 1] * sums[1, p] >= least:
                pairs[found, 0], pairs[found, 1] = q, p
                found += 1
    return found
