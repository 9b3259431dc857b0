"""The processor's side of `offrl.nets.neighbors`: a tree of boxes over states, scanned with vector instructions.

Why by hand: PRDC asks 256 questions an actor update, and a library's tree spends nearly all of the training on them. Three
facts make an exact answer cheap here:

1. A query's state is a row of the dataset, so the row's own action bounds the answer: nothing farther than
   R = |pi(s_i) - a_i| needs a look, and everything within R has a state within R / beta of s_i.
2. Each row's nearest other states are known (`lists`): where the list reaches beyond R / beta, it holds the answer.
3. What a list can't settle goes to leaves of W rows that are close in state. A leaf whose box is farther than the best
   pair so far is skipped; of the others, codes of a byte a dimension rule out nearly all rows (`neighbor_codes.py`).

Boxes lie along the principal axes of the states, where they are tighter. Boxes and codes only rule out: whatever might be the
answer, rounding included, is measured in float64 from the original numbers.

The functions are compiled by Numba and hold no Python object, so threads run them side by side.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from offrl.nets.neighbor_codes import WIDTH, Codes, aligned, borrowed, close_rows, encode, groups_of, make_codes

Array = Any  # a NumPy array; Numba wants no type from us

GROUP = 64  # leaves in a group: one level of the tree, checked before its leaves
_STRIDE = 4  # dimensions between checks whether a leaf is already known to be too far
_FAR = np.float32(1e18)  # coordinate of padding, whose square float32 still holds
_ROUNDING = 1e-5  # relative error of a float32 sum of at most some hundred squares, generously
# Calls hand over some hundred words of arrays each; the innermost ones are made part of their callers.
_INNER: dict[str, Any] = {"nogil": True, "cache": True, "forceinline": True}
# No NaN can occur, a sign of zero doesn't matter, and products may be fused into sums; infinities keep their meaning.
_FAST = {"nnan", "nsz", "contract"}


class Tree(NamedTuple):
    """Arrays of the index; "place" is a row's number in the order of the leaves.

    Attributes:
        states, actions: `[N, S]`, `[N, A]` float32 in the order of places, as the user gave them.
        turned: `[N, S]` float32, states along principal axes.
        codes: of the rows of each leaf.
        boxes: `[2, G, A + S, 64]` float32, lower and upper corners of the leaves, by groups.
        outer: `[2, A + S, G]` float32, corners of the groups.
        near: `[N, L]` int32 places of each row's nearest other states, -1 where there is none.
        near_distance: `[N, L]` float32, their distances rounded down; infinite where there is none.
        axes: `[S, S]` float64, the principal axes as columns.
        slip: how far turning and rounding may have moved two states with respect to each other.
    """

    states: Array
    actions: Array
    turned: Array
    codes: Codes
    boxes: Array
    outer: Array
    near: Array
    near_distance: Array
    axes: Array
    slip: float


class Queries(NamedTuple):
    """Questions that are answered together.

    Attributes:
        states, actions: `[Q, S]`, `[Q, A]` float32; points: `[Q, A + S]`, action and turned state.
        betas: `[Q]` float64, the weight of states.
        homes: `[Q]` int64, the leaf to begin with, or -1; left_out: `[Q]` int64, a place that is no answer, or -1.
        bounds: `[Q]` float64, a squared distance that is known to reach the k-th answer; it shrinks.
        limits: `[Q]` float32, `reach` of the bounds.
        codes, terms: see `encode`.
        best, best_place: `[Q, k]` float64 and int64, the answers: squared distances in rising order, and places.
    """

    states: Array
    actions: Array
    points: Array
    betas: Array
    homes: Array
    left_out: Array
    bounds: Array
    limits: Array
    codes: Array
    terms: Array
    best: Array
    best_place: Array


def principal_axes(states: Array) -> Array:
    """`[S, S]` float64, an orthogonal matrix whose columns are the axes, widest first."""
    columns = states.astype(np.float64)
    if len(columns) < 2:  # no covariance
        return np.eye(columns.shape[1])
    _, axes = np.linalg.eigh(np.cov(columns.T).reshape(columns.shape[1], -1))
    return np.ascontiguousarray(axes[:, ::-1])


def leaf_order(turned: Array) -> Array:
    """`[N]` int64: rows by leaves, every leaf but the last one full; each cut halves the axis of largest variance."""
    order = np.arange(len(turned))
    todo = [(0, len(turned))]
    while todo:
        low, high = todo.pop()
        leaves = -(-(high - low) // WIDTH)
        if leaves <= 1:
            continue
        part = turned[order[low:high]]
        middle = leaves // 2 * WIDTH
        column = part[:, part.var(0).argmax()]
        order[low:high] = order[low:high][np.argpartition(column, middle)]
        todo += [(low, low + middle), (low + middle, high)]
    return order


def make_tree(states: Array, actions: Array, axes: Array, order: Array, near: Array, near_distance: Array) -> Tree:
    """The arrays of the index for rows in their original order; `near` and its distances are by places already."""
    states = np.ascontiguousarray(states[order])
    actions = np.ascontiguousarray(actions[order])
    turned, slip = turn(states, axes)
    n, width = len(states), states.shape[1] + actions.shape[1]
    count = -(-n // WIDTH)
    both = np.concatenate([actions, turned], 1)
    groups = -(-count // GROUP)
    corners = np.full((2, groups * GROUP, width), _FAR, np.float32)  # a missing leaf is a box far away
    starts = np.arange(0, n, WIDTH)
    corners[0, :count] = np.minimum.reduceat(both, starts, 0)
    corners[1, :count] = np.maximum.reduceat(both, starts, 0)
    boxes = aligned(corners.reshape(2, groups, GROUP, width).transpose(0, 1, 3, 2))
    starts = np.arange(0, count, GROUP)
    low, high = np.minimum.reduceat(corners[0, :count], starts, 0), np.maximum.reduceat(corners[1, :count], starts, 0)
    outer = np.stack([low.T, high.T])
    codes = make_codes(states, actions)
    return Tree(states, actions, turned, codes, boxes, np.ascontiguousarray(outer), near, near_distance, axes, slip)


def turn(states: Array, axes: Array) -> tuple[Array, float]:
    """Turned states in float32, and twice the largest distance by which rounding moved one of them."""
    turned = np.empty_like(states)
    moved = 0.0
    for low in range(0, len(states), 65_536):  # bounds the memory of the float64 copy
        exact = states[low : low + 65_536].astype(np.float64) @ axes
        turned[low : low + 65_536] = exact
        error = exact - turned[low : low + 65_536]
        moved = max(moved, float(np.sqrt((error * error).sum(1)).max()))
    return turned, 2 * moved


@njit(**_INNER)
def pair_distance(tree: Tree, state: Array, action: Array, place: int, beta_squared: float) -> float:
    """beta^2 |s - s_j|^2 + |pi - a_j|^2 in float64 from the original float32 numbers."""
    apart = 0.0
    if beta_squared > 0.0:
        for d in range(state.shape[0]):
            t = np.float64(state[d]) - np.float64(tree.states[place, d])
            apart += t * t
    far = 0.0
    for d in range(action.shape[0]):
        t = np.float64(action[d]) - np.float64(tree.actions[place, d])
        far += t * t
    return beta_squared * apart + far


@njit(nogil=True, cache=True)
def action_distance(tree: Tree, action: Array, place: int) -> float:
    """|pi - a_j|^2 in float64."""
    far = 0.0
    for d in range(action.shape[0]):
        t = np.float64(action[d]) - np.float64(tree.actions[place, d])
        far += t * t
    return far


@njit(nogil=True, cache=True)
def keep(best: Array, best_place: Array, distance: float, place: int) -> None:
    """Put a pair among the k nearest so far, which stand in rising order; of equals the earlier one stays in front."""
    k = len(best)
    if distance >= best[k - 1] and best_place[k - 1] >= 0:
        return
    i = k - 1
    while i > 0 and (best[i - 1] > distance or best_place[i - 1] < 0):
        best[i], best_place[i] = best[i - 1], best_place[i - 1]
        i -= 1
    best[i], best_place[i] = distance, place


@njit(**_INNER)
def reach(distance: float, beta: float, slip: float) -> np.float32:
    """What a float32 squared distance may be at most for its pair to lie within `distance` (squared, exact)."""
    if distance == np.inf:
        return np.float32(np.inf)
    slack = 2.0 * slip * beta * np.sqrt(distance) + (slip * beta) ** 2
    return np.float32((distance + slack) * (1.0 + _ROUNDING) + 1e-30)


@njit(fastmath=_FAST, **_INNER)
def add_boxes(low: Array, high: Array, point: Array, first: int, last: int, weight: np.float32, out: Array) -> None:
    """`out[m] += weight * squared distance from a point to box m` over the dimensions `first <= d < last`."""
    zero = np.float32(0)
    d = first
    while d + 2 <= last:  # two at a time spare traffic with `out`
        a, b = point[d], point[d + 1]
        for m in range(out.shape[0]):
            t = max(max(low[d, m] - a, a - high[d, m]), zero)
            u = max(max(low[d + 1, m] - b, b - high[d + 1, m]), zero)
            out[m] += weight * (t * t + u * u)
        d += 2
    if d < last:
        a = point[d]
        for m in range(out.shape[0]):
            t = max(max(low[d, m] - a, a - high[d, m]), zero)
            out[m] += weight * (t * t)


@njit(fastmath=_FAST, **_INNER)
def box_distances(
    low: Array, high: Array, point: Array, split: int, weight: np.float32, limit: np.float32, out: Array
) -> bool:
    """`out[m]`: squared distance from a point to box m, from dimension `split` on times `weight`.

    False when all are known to exceed `limit`; they may then be too small.
    """
    for m in range(out.shape[0]):
        out[m] = 0
    add_boxes(low, high, point, 0, split, np.float32(1), out)
    head = min(split + _STRIDE, point.shape[0])
    add_boxes(low, high, point, split, head, weight, out)
    within = np.int32(0)
    for m in range(out.shape[0]):
        within += np.int32(out[m] <= limit)
    if within == 0:
        return False
    add_boxes(low, high, point, head, point.shape[0], weight, out)
    return True


@njit(**_INNER)
def scan(tree: Tree, ask: Queries, leaf: int, callers: Array, count: int, pairs: Array) -> None:
    """Measure a leaf's rows against the k nearest so far of the queries `callers[:count]`, where codes don't rule them out.

    pairs: `[Q W, 2]` int32, memory.
    """
    betas, bounds, rows = ask.betas, ask.bounds, len(tree.states)
    first, split = leaf * WIDTH, groups_of(tree.actions.shape[1])
    found = close_rows(tree.codes, leaf, split, ask.codes, ask.terms, ask.limits, callers, count, pairs)
    for i in range(found):
        q, place = pairs[i, 0], first + pairs[i, 1]
        if place >= rows:
            continue
        distance = pair_distance(tree, ask.states[q], ask.actions[q], place, betas[q] * betas[q])
        if distance <= bounds[q]:
            take(tree, ask, q, place, distance)


@njit(nogil=True, cache=True)
def take(tree: Tree, ask: Queries, q: int, place: int, distance: float) -> None:
    """Put a pair among the k nearest so far of query q, unless it is left out."""
    if place == ask.left_out[q]:
        return
    best, best_place = ask.best[q], ask.best_place[q]
    keep(best, best_place, distance, place)
    if best_place[-1] >= 0 and best[-1] < ask.bounds[q]:
        ask.bounds[q] = best[-1]
        ask.limits[q] = reach(best[-1], ask.betas[q], tree.slip)


@njit(nogil=True, cache=True)
def search(tree: Tree, ask: Queries) -> None:
    """The k nearest pairs of the whole dataset for every query."""
    count, groups = len(ask.betas), tree.boxes.shape[1]
    encode(tree.codes, ask.actions, ask.states, ask.betas, ask.codes, ask.terms)
    pairs, near_enough = np.empty((count * WIDTH, 2), np.int32), np.empty(count, np.int32)
    boxes, outer = np.empty(GROUP, np.float32), np.empty((count, groups), np.float32)
    callers, how_far = np.empty((GROUP, count), np.int32), np.empty((GROUP, count), np.float32)
    visit(tree, ask, (pairs, near_enough, boxes, outer, callers, how_far))


@njit(nogil=True, cache=True)
def visit(held_tree: Tree, held_queries: Queries, held_memory: tuple[Array, ...]) -> None:
    """`search` with memory; the caller holds all arrays until it is over.

    All queries visit a group of leaves, leaf by leaf, before they go on to the next: so rows come from memory once.
    Near leaves first, where nothing bounds a query yet, since they shrink its bound: its home, then what lies within half the
    distance known by then, then the rest. Queries with a bound visit all in one round: theirs hardly shrinks (PRDC's are
    within 6 % of the answer), and a second round reads everything again.
    """
    tree, ask = borrowed(held_tree), borrowed(held_queries)
    pairs, near_enough, boxes, outer, callers, how_far = borrowed(held_memory)
    homes, limits, betas, points = ask.homes, ask.limits, ask.betas, ask.points
    lowest, highest, leaves = tree.outer[0], tree.outer[1], len(tree.codes.rows)
    count, groups, split = len(betas), tree.boxes.shape[1], tree.actions.shape[1]
    halfway, calls, chosen = np.empty(count, np.float32), np.empty(GROUP, np.int64), np.empty(GROUP + 1, np.int64)
    rounds = 1
    for q in range(count):
        weight = np.float32(betas[q] * betas[q])
        unbounded = ask.bounds[q] == np.inf
        limits[q] = reach(ask.bounds[q], betas[q], tree.slip)
        box_distances(lowest, highest, points[q], split, weight, np.float32(np.inf), outer[q])
        if homes[q] >= 0:
            near_enough[0] = q
            scan(tree, ask, homes[q], near_enough, 1, pairs)
        halfway[q] = np.float32(0.25) * limits[q] if unbounded else np.float32(-1)
        rounds = 2 if unbounded else rounds
    for part in range(2 - rounds, 2):
        for g in range(groups):
            low, high = tree.boxes[0, g], tree.boxes[1, g]
            first, here = g * GROUP, min(GROUP, leaves - g * GROUP)
            calls[:] = 0
            for q in range(count):
                home, half = homes[q] - first, halfway[q]
                limit = min(limits[q], half) if part == 0 else limits[q]
                if outer[q, g] > limit:
                    continue
                weight = np.float32(betas[q] * betas[q])
                if not box_distances(low, high, points[q], split, weight, limit, boxes):
                    continue
                # Two loops: the first, over all leaves of the group, has no branch that depends on a distance.
                few, beyond = 0, half if part == 1 else np.float32(-1)
                for m in range(here):
                    chosen[few] = m
                    few += int((boxes[m] <= limit) & (boxes[m] > beyond) & (m != home))
                for i in range(few):
                    m = chosen[i]
                    callers[m, calls[m]], how_far[m, calls[m]] = q, boxes[m]
                    calls[m] += 1
            for m in range(here):
                few = 0
                for i in range(calls[m]):
                    near_enough[few] = callers[m, i]
                    few += int(how_far[m, i] <= limits[callers[m, i]])
                if few > 0:
                    scan(tree, ask, first + m, near_enough, few, pairs)


@njit(nogil=True, cache=True)
def near_states(tree: Tree, first: int, last: int, near: Array, near_distance: Array) -> None:
    """Fill the lists of places `first ... last - 1` of a tree without actions: the nearest other states."""
    count, size = last - first, near.shape[1]
    places = np.arange(first, last)
    points = tree.turned[first:last]
    best, best_place = np.full((count, size), np.inf), np.full((count, size), -1)
    no_actions = np.empty((count, 0), np.float32)
    homes, bounds, limits = places // WIDTH, np.full(count, np.inf), np.empty(count, np.float32)
    states, betas = tree.states[first:last], np.ones(count)
    codes, terms = np.empty((count, 4 * tree.codes.rows.shape[1]), np.int8), np.empty((count, 5))
    ask = Queries(states, no_actions, points, betas, homes, places, bounds, limits, codes, terms, best, best_place)
    search(tree, ask)
    near[first:last] = best_place
    near_distance[first:last] = np.sqrt(best) * (1.0 - 2e-7)  # a lower bound in float32 too


@njit(nogil=True, cache=True)
def ask_list(tree: Tree, place: int, action: Array, beta: float, best: Array, best_place: Array) -> bool:
    """The k nearest pairs among the row itself and its list; True when no other row can be nearer."""
    beta_squared, k = beta * beta, len(best)
    keep(best, best_place, action_distance(tree, action, place), place)
    for i in range(tree.near.shape[1]):
        other, apart = tree.near[place, i], np.float64(tree.near_distance[place, i])
        apart = beta_squared * (apart * apart)
        if best_place[k - 1] >= 0 and apart >= best[k - 1]:
            return True
        if other < 0:
            return True  # the list holds the whole dataset
        if best_place[k - 1] < 0 or apart + action_distance(tree, action, other) <= best[k - 1]:
            keep(best, best_place, pair_distance(tree, tree.states[place], action, other, beta_squared), other)
    return False


@njit(nogil=True, cache=True)
def ask_lists(
    tree: Tree, places: Array, actions: Array, betas: Array, found: Array, distance: Array, from_list: Array
) -> None:
    """Answer what the rows' lists can.

    Args:
        places: `[Q]` int64, the rows whose states are asked about; -1 for a state of its own.
        actions, betas: `[Q, A]` float32, `[Q]` float64.
        found, distance: `[Q, k]` int64 places and float64 distances, to be filled: the k nearest pairs where they are
            settled, else the k nearest on the list, which bound them (infinite where the list is too short).
        settled: `[Q]` uint8, to be filled: 1 where the list alone gave the answer.
    """
    for q in range(len(places)):
        found[q], distance[q] = -1, np.inf
        from_list[q] = places[q] >= 0 and ask_list(tree, places[q], actions[q], betas[q], distance[q], found[q])
        distance[q] = np.sqrt(distance[q])


@njit(nogil=True, cache=True)
def answer(
    tree: Tree,
    rest: Array,
    places: Array,
    states: Array,
    turned: Array,
    actions: Array,
    betas: Array,
    found: Array,
    distance: Array,
) -> None:
    """Search the tree for the queries whose numbers stand in `rest`, which `ask_lists` has left open.

    Args:
        states, turned: `[Q, S]` float32, read where a place is -1 (one row will do when there is none).
        the others: as in `ask_lists`.
    """
    count, k, width = len(rest), found.shape[1], tree.actions.shape[1]
    asked, points = (
        np.empty((count, tree.states.shape[1]), np.float32),
        np.empty((count, tree.outer.shape[1]), np.float32),
    )
    asked_actions, homes, weights = np.empty((count, width), np.float32), np.empty(count, np.int64), np.empty(count)
    bounds, limits = np.empty(count), np.empty(count, np.float32)
    for i in range(count):
        q = rest[i]
        place = places[q]
        asked[i] = tree.states[place] if place >= 0 else states[q]
        points[i, :width] = asked_actions[i] = actions[q]
        points[i, width:] = tree.turned[place] if place >= 0 else turned[q]
        homes[i] = place // WIDTH if place >= 0 else -1
        weights[i] = betas[q]
        # A root and its square may fall below the number they came from; the bound must not.
        bounds[i] = distance[q, k - 1] ** 2 * (1.0 + 1e-15)
    best, best_place, nobody = np.full((count, k), np.inf), np.full((count, k), -1), np.full(count, -1)
    codes, terms = np.empty((count, 4 * tree.codes.rows.shape[1]), np.int8), np.empty((count, 5))
    ask = Queries(asked, asked_actions, points, weights, homes, nobody, bounds, limits, codes, terms, best, best_place)
    search(tree, ask)
    for i in range(count):
        found[rest[i]], distance[rest[i]] = best_place[i], np.sqrt(best[i])
