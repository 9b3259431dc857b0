"""The codes of the search for neighbours: what they rule out lies beyond the limit; compiled sums are the plain ones."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch

from offrl.nets import kernels
from offrl.nets.neighbor_codes import WIDTH, Codes, close_rows, encode, make_codes
from offrl.nets.neighbors import OnProcessor

ROWS = 1000  # the last leaf has 40 of 64


class Asked(NamedTuple):
    states: np.ndarray
    actions: np.ndarray
    betas: np.ndarray


def data(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """States and actions whose coordinates the codes keep, cut off, or can't tell apart."""
    rng = np.random.default_rng(0)
    states, actions = rng.normal(size=(ROWS, 7)), rng.uniform(-1, 1, (ROWS, 5))
    if kind == "heavy tails":
        states = rng.standard_t(1.0, (ROWS, 7)) * 3
    elif kind == "one far row":
        states[3] = 1e6
    elif kind == "offset":
        states, actions = states + 300, actions * 1e-3 + 7
    elif kind == "constant":
        states[:], actions[:, 2] = 1.0, 0.5
    elif kind == "states alone":
        actions = actions[:, :0]
    return states.astype(np.float32), actions.astype(np.float32)


def questions(states: np.ndarray, actions: np.ndarray, count: int = 40) -> Asked:
    rng = np.random.default_rng(1)
    rows = rng.integers(ROWS, size=count)
    stray = 0.3 * rng.normal(size=(count, actions.shape[1]))
    betas = np.resize([0.0, 1e-3, 0.5, 2.0, 1e3], count).astype(np.float64)
    return Asked(states[rows], (actions[rows] + stray).astype(np.float32), betas)


def squared_distances(states: np.ndarray, actions: np.ndarray, asked: Asked) -> np.ndarray:
    """`[Q, N]` in float64."""
    apart = np.square(states[None].astype(float) - asked.states[:, None].astype(float)).sum(-1)
    far = np.square(actions[None].astype(float) - asked.actions[:, None].astype(float)).sum(-1)
    return asked.betas[:, None] ** 2 * apart + far


def passing(codes: Codes, asked: Asked, limits: np.ndarray, function: int = 0) -> np.ndarray:
    """`[Q, leaves W]` bool: which rows codes don't rule out; places behind the last row too."""
    count, leaves = len(asked.betas), len(codes.rows)
    words, terms = np.empty((count, 4 * codes.rows.shape[1]), np.int8), np.empty((count, 5))
    encode(codes, asked.actions, asked.states, asked.betas, words, terms)
    pairs, callers = np.empty((count * WIDTH, 2), np.int32), np.arange(count, dtype=np.int32)
    split, out = -(-asked.actions.shape[1] // 4), np.zeros((count, leaves * WIDTH), bool)
    for leaf in range(leaves):
        question = (split, words, terms, limits.astype(np.float32), callers, count, pairs)
        found = close_rows(codes._replace(function=function), leaf, *question)
        out[pairs[:found, 0], leaf * WIDTH + pairs[:found, 1]] = True
    return out


KINDS = ["normal", "heavy tails", "one far row", "offset", "constant", "states alone"]


@pytest.mark.parametrize("kind", KINDS)
def test_no_row_within_a_limit_is_ruled_out(kind: str) -> None:
    """Limits at a row's exact distance, where the least slip shows: every row up to there passes, for all weights of states."""
    assert_all_within_pass(kind, 0)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_code_rules_none_out_either(kind: str) -> None:
    assert_all_within_pass(kind, kernels.address("close_rows"))


def assert_all_within_pass(kind: str, function: int) -> None:
    states, actions = data(kind)
    codes, asked = make_codes(states, actions), questions(states, actions)
    square = squared_distances(states, actions, asked)
    for rank in (0, 1, 10, 200, ROWS - 1):
        limits = np.sort(square, 1)[:, rank]
        # float32 may round a limit down; the search adds more than that to it (`reach`).
        kept = passing(codes, asked, limits * (1 + 1e-6), function)[:, :ROWS]
        assert kept[square <= limits[:, None]].all(), rank


def test_most_rows_beyond_a_limit_are_ruled_out() -> None:
    """What the codes are for: of rows beyond 1.5 times the tenth distance none passes; residuals are shorter than that."""
    states, actions = data("normal")
    codes, asked = make_codes(states, actions), questions(states, actions)
    square = squared_distances(states, actions, asked)
    limits = np.sort(square, 1)[:, 10]
    kept = passing(codes, asked, limits)
    ordinary = asked.betas == 2.0
    assert not kept[ordinary, :ROWS][square[ordinary] > 1.5**2 * limits[ordinary, None]].any()
    assert kept[ordinary, :ROWS].mean() < 0.1
    assert not kept[:, ROWS:].any(), "padding is no row"


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_and_plain_pass_the_same_rows(kind: str) -> None:
    """Whole numbers have one sum; only rows within float32's rounding of a limit may differ: here at most one in a thousand."""
    states, actions = data(kind)
    codes, asked = make_codes(states, actions), questions(states, actions)
    for rank in (5, 300):
        limits = np.sort(squared_distances(states, actions, asked), 1)[:, rank]
        one, other = (passing(codes, asked, limits, function) for function in (0, kernels.address("close_rows")))
        assert (one != other).mean() <= 1e-3


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("kind", KINDS)
def test_a_search_by_compiled_code_finds_what_plain_code_finds(kind: str) -> None:
    """The whole index, its lists included: distances in float64 to the bit."""
    states, actions = map(torch.from_numpy, data(kind))
    asked = questions(states.numpy(), actions.numpy())
    rows, betas = torch.arange(40), torch.from_numpy(asked.betas)
    index = OnProcessor(states, actions, keep=False)
    assert index.tree.codes.function
    for k in (1, 3):
        _, distance, _ = index.query(rows, torch.from_numpy(asked.actions), betas, k, None)
        plain = OnProcessor.__new__(OnProcessor)
        vars(plain).update(vars(index), tree=index.tree._replace(codes=index.tree.codes._replace(function=0)))
        _, expected, _ = plain.query(rows, torch.from_numpy(asked.actions), betas, k, None)
        assert torch.equal(distance, expected)


def test_an_unlimited_question_passes_all_rows() -> None:
    states, actions = data("normal")
    codes, asked = make_codes(states, actions), questions(states, actions)
    assert passing(codes, asked, np.full(40, np.inf))[:, :ROWS].all()


@pytest.mark.usefixtures("compiled")
def test_sums_of_bytes_are_exact_at_their_extremes() -> None:
    """Codes 0 and 127 against -64 and 63 in every dimension, where sums of pairs come closest to 16 bits."""
    rng = np.random.default_rng(2)
    states = np.zeros((WIDTH, 40), np.float32)
    codes = make_codes(states, states[:, :0])
    rows = rng.choice(np.array([0, 127], np.uint8), (1, 10, WIDTH, 4))
    rows[0, :, 0], rows[0, :, 1] = 0, 127
    extreme = codes._replace(rows=rows, starts=np.zeros_like(codes.starts))
    words = np.array([[-64], [63]], np.int8).repeat(40, 1)
    sums = rows[0].transpose(1, 0, 2).reshape(WIDTH, 40).astype(np.int64) @ words.T.astype(np.int64)
    pairs = np.empty((WIDTH, 2), np.int32)
    for q in range(2):
        for bound in np.unique(sums[:, q]):
            for least in (bound - 0.5, bound + 0.5):  # both sides of each sum there is
                terms = np.array([[0.0, 1.0, 2 * least, 0.0, 0.0]]).repeat(2, 0)
                caller, limits = np.array([q], np.int32), np.zeros(2, np.float32)
                found = close_rows(extreme, 0, 0, words, terms, limits, caller, 1, pairs)
                assert set(pairs[:found, 1]) == set(np.flatnonzero(sums[:, q] >= least))
