"""The processor's side of `offrl.nets.neighbors`: a tree of boxes over states, scanned with vector instructions.

Why by hand: PRDC asks 256 questions an actor update, and a library's tree spends nearly all of the training on them. Three
facts make an exact answer cheap here:

1. A query's state is a row of the dataset, so the row's own action bounds the answer: nothing farther than
   R = |pi(s_i) - a_i| needs a look, and everything within R has a state within R / beta of s_i.
2. Each row's nearest other states are known (`lists`): where the list reaches beyond R / beta, it holds the answer.
3. What a list can't settle goes to leaves of W rows that are close in state. A leaf whose box is farther than the best
   pair so far is skipped; the others are scanned by one loop per dimension over W rows, which compiles to vector code.

Boxes and scans work on float32 states that were turned to their principal axes (boxes are tighter there). They only
rule out: whatever might be the answer, rounding included, is measured again in float64 from the original numbers.

The functions are compiled by Numba and hold no Python object, so threads run them side by side.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit

Array = Any  # a NumPy array; Numba wants no type from us

WIDTH = 64
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
        leaves: `[M, A + S, W]` float32, actions and turned states of each leaf, padded with far away rows. Actions come
            first: where the policy strays from the data, they and the first axes already rule most rows out.
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
    leaves: Array
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
    best: Array
    best_place: Array


def principal_axes(states: Array) -> Array:
    """`[S, S]` float64, an orthogonal matrix whose columns are the axes, widest first."""
    columns = states.astype(np.float64)
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
    leaves = np.full((count, width, WIDTH), _FAR, np.float32)
    both = np.concatenate([actions, turned], 1)
    full = n // WIDTH
    leaves[:full] = both[: full * WIDTH].reshape(full, WIDTH, width).transpose(0, 2, 1)
    if full < count:
        leaves[full, :, : n - full * WIDTH] = both[full * WIDTH :].T
    groups = -(-count // GROUP)
    corners = np.full((2, groups * GROUP, width), _FAR, np.float32)  # a missing leaf is a box far away
    starts = np.arange(0, n, WIDTH)
    corners[0, :count] = np.minimum.reduceat(both, starts, 0)
    corners[1, :count] = np.maximum.reduceat(both, starts, 0)
    boxes = np.ascontiguousarray(corners.reshape(2, groups, GROUP, width).transpose(0, 1, 3, 2))
    starts = np.arange(0, count, GROUP)
    low, high = np.minimum.reduceat(corners[0, :count], starts, 0), np.maximum.reduceat(corners[1, :count], starts, 0)
    outer = np.stack([low.T, high.T])
    return Tree(states, actions, turned, leaves, boxes, np.ascontiguousarray(outer), near, near_distance, axes, slip)


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


@njit(nogil=True, cache=True)
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
    low: Array, high: Array, point: Array, skip: int, split: int, weight: np.float32, limit: np.float32, out: Array
) -> bool:
    """`out[m]`: squared distance from a point to box m, from dimension `skip` on, from `split` on times `weight`.

    False when all are known to exceed `limit`; they may then be too small.
    """
    for m in range(out.shape[0]):
        out[m] = 0
    add_boxes(low, high, point, skip, split, np.float32(1), out)
    head = min(split + _STRIDE, point.shape[0])
    add_boxes(low, high, point, split, head, weight, out)
    within = np.int32(0)
    for m in range(out.shape[0]):
        within += np.int32(out[m] <= limit)
    if within == 0:
        return False
    add_boxes(low, high, point, head, point.shape[0], weight, out)
    return True


@njit(fastmath=_FAST, **_INNER)
def add_squares(
    leaves: Array, leaf: int, points: Array, q: int, first: int, last: int, weight: np.float32, sums: Array, slot: int
) -> None:
    """`sums[slot, p] += weight * sum of (leaves[leaf, d, p] - points[q, d])^2` over `first <= d < last`."""
    d = first
    while d + 4 <= last:  # four at a time spare traffic with `sums`
        a, b, c, e = points[q, d], points[q, d + 1], points[q, d + 2], points[q, d + 3]
        for p in range(WIDTH):
            t, u = leaves[leaf, d, p] - a, leaves[leaf, d + 1, p] - b
            v, w = leaves[leaf, d + 2, p] - c, leaves[leaf, d + 3, p] - e
            sums[slot, p] += weight * ((t * t + u * u) + (v * v + w * w))
        d += 4
    while d < last:
        a = points[q, d]
        for p in range(WIDTH):
            t = leaves[leaf, d, p] - a
            sums[slot, p] += weight * (t * t)
        d += 1


@njit(fastmath=_FAST, **_INNER)
def sift(tree: Tree, ask: Queries, leaf: int, first: int, last: int, callers: Array, count: int, sums: Array) -> int:
    """Add the dimensions `first <= d < last` for the callers of a leaf; those that a row may still be near enough for.

    Args:
        callers: `[2, Q]` int32, numbers of queries and of their rows of `sums`; the first `count` are read, and those
            that stay are moved to the front. Moving all and counting on the yes needs no branch: one that no processor
            can predict would wait for each sum.
        sums: `[Q, W]` float32, squared distances so far.

    Returns:
        how many stay.
    """
    split, stay = tree.actions.shape[1], 0
    for i in range(count):
        q, slot = callers[0, i], callers[1, i]
        weight = np.float32(ask.betas[q] * ask.betas[q])
        middle = min(max(first, split), last)  # actions before it, states from it on
        add_squares(tree.leaves, leaf, ask.points, q, first, middle, np.float32(1), sums, slot)
        add_squares(tree.leaves, leaf, ask.points, q, middle, last, weight, sums, slot)
        within, limit = np.int32(0), ask.limits[q]
        for p in range(WIDTH):  # a count compiles to vector code where a minimum does not
            within += np.int32(sums[slot, p] <= limit)
        callers[0, stay], callers[1, stay] = q, slot
        stay += int(within > 0)
    return stay


@njit(nogil=True, cache=True)
def scan(tree: Tree, ask: Queries, leaf: int, callers: Array, count: int, skip: int, sums: Array) -> None:
    """Measure a leaf's rows against the k nearest so far of the queries `callers[0, :count]`; see `sift`."""
    for i in range(count):
        callers[1, i] = i
        for p in range(WIDTH):
            sums[i, p] = 0
    first, width, place = skip, tree.leaves.shape[1], leaf * WIDTH
    last = min(max(skip, tree.actions.shape[1]) + _STRIDE, width)
    while first < width and count > 0:
        count = sift(tree, ask, leaf, first, last, callers, count, sums)
        first, last = last, min(last + _STRIDE, width)
    for i in range(count):
        for p in range(min(WIDTH, len(tree.states) - place)):
            if sums[callers[1, i], p] <= ask.limits[callers[0, i]]:
                measure(tree, ask, callers[0, i], place + p)


@njit(nogil=True, cache=True)
def measure(tree: Tree, ask: Queries, q: int, place: int) -> None:
    """The pair at a place among the k nearest so far of query q, if it is one of them."""
    if place == ask.left_out[q]:
        return
    beta, best, best_place = ask.betas[q], ask.best[q], ask.best_place[q]
    distance = pair_distance(tree, ask.states[q], ask.actions[q], place, beta * beta)
    if distance <= ask.bounds[q]:
        keep(best, best_place, distance, place)
        if best_place[-1] >= 0 and best[-1] < ask.bounds[q]:
            ask.bounds[q] = best[-1]
            ask.limits[q] = reach(best[-1], beta, tree.slip)


@njit(nogil=True, cache=True)
def search(tree: Tree, ask: Queries, skip: int) -> None:
    """The k nearest pairs of the whole dataset for every query.

    All queries visit a group of leaves, leaf by leaf, before they go on to the next: so rows come from memory once.
    Near leaves first, since they shrink the bounds: each query's home, then what lies within half the distance known
    by then, then the rest. `skip` leading dimensions of the points don't count.
    """
    count, groups, split = len(ask.betas), tree.boxes.shape[1], tree.actions.shape[1]
    sums, boxes = np.empty((count, WIDTH), np.float32), np.empty(GROUP, np.float32)
    near_enough = np.empty((2, count), np.int32)
    outer, halfway = np.empty((count, groups), np.float32), np.empty(count, np.float32)
    callers, how_far = np.empty((GROUP, count), np.int32), np.empty((GROUP, count), np.float32)
    for q in range(count):
        weight = np.float32(ask.betas[q] * ask.betas[q])
        ask.limits[q] = reach(ask.bounds[q], ask.betas[q], tree.slip)
        box_distances(tree.outer[0], tree.outer[1], ask.points[q], skip, split, weight, np.float32(np.inf), outer[q])
        if ask.homes[q] >= 0:
            near_enough[0, 0] = q
            scan(tree, ask, ask.homes[q], near_enough, 1, skip, sums)
        halfway[q] = np.float32(0.25) * ask.limits[q]
    for part in range(2):
        for g in range(groups):
            calls = np.zeros(GROUP, np.int64)
            for q in range(count):
                limit = min(ask.limits[q], halfway[q]) if part == 0 else ask.limits[q]
                if outer[q, g] > limit:
                    continue
                weight, low, high = np.float32(ask.betas[q] * ask.betas[q]), tree.boxes[0, g], tree.boxes[1, g]
                if not box_distances(low, high, ask.points[q], skip, split, weight, limit, boxes):
                    continue
                for m in range(min(GROUP, len(tree.leaves) - g * GROUP)):
                    if boxes[m] <= limit and (part == 0 or boxes[m] > halfway[q]) and g * GROUP + m != ask.homes[q]:
                        callers[m, calls[m]], how_far[m, calls[m]] = q, boxes[m]
                        calls[m] += 1
            for m in range(GROUP):
                few = 0
                for i in range(calls[m]):
                    near_enough[0, few] = callers[m, i]
                    few += int(how_far[m, i] <= ask.limits[callers[m, i]])
                if few > 0:
                    scan(tree, ask, g * GROUP + m, near_enough, few, skip, sums)


@njit(nogil=True, cache=True)
def near_states(tree: Tree, first: int, last: int, near: Array, near_distance: Array) -> None:
    """Fill the lists of places `first ... last - 1`: the nearest other states, by distance between states alone."""
    count, size, actions = last - first, near.shape[1], tree.actions.shape[1]
    places = np.arange(first, last)
    points = np.zeros((count, tree.leaves.shape[1]), np.float32)
    points[:, actions:] = tree.turned[first:last]
    best, best_place = np.full((count, size), np.inf), np.full((count, size), -1)
    no_actions = np.empty((count, 0), np.float32)
    homes, bounds, limits = places // WIDTH, np.full(count, np.inf), np.empty(count, np.float32)
    states, betas = tree.states[first:last], np.ones(count)
    ask = Queries(states, no_actions, points, betas, homes, places, bounds, limits, best, best_place)
    search(tree, ask, actions)
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
        np.empty((count, tree.leaves.shape[1]), np.float32),
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
    ask = Queries(asked, asked_actions, points, weights, homes, nobody, bounds, limits, best, best_place)
    search(tree, ask, int(np.int64(0)))  # a literal 0 would be compiled as a second version
    for i in range(count):
        found[rest[i]], distance[rest[i]] = best_place[i], np.sqrt(best[i])
