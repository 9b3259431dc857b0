"""The random numbers: the published generator, the laws of what is drawn, and which draws belong together."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from offrl.utils.random import LaneRandom, _name_key, mix

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
# Fixed seeds make every p-value below a constant: it fails by chance once in ten thousand rewrites, not runs.
P_VALUE = 1e-4


def signed(x: int) -> int:
    """A 64-bit pattern as torch's int64 holds it."""
    return (x & MASK) - (1 << 64) * ((x & MASK) >> 63)


def plain_mix(x: int) -> int:
    """SplitMix64's finaliser as published, on unsigned Python integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def inverse_mix(x: int) -> int:
    """Undo `plain_mix` step by step."""
    x ^= (x >> 31) ^ (x >> 62)
    x = (x * pow(0x94D049BB133111EB, -1, 1 << 64)) & MASK
    x ^= (x >> 27) ^ (x >> 54)
    x = (x * pow(0xBF58476D1CE4E5B9, -1, 1 << 64)) & MASK
    return x ^ (x >> 30) ^ (x >> 60)


# ---- the generator --------------------------------------------------------------------------------------------


def test_mix_is_the_published_generator() -> None:
    """The sequence of SplitMix64 from seed 1234567, as its reference implementation prints it."""
    states = torch.tensor([signed(1234567 + k * GOLDEN) for k in range(1, 6)])
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [x & MASK for x in mix(states).tolist()] == expected


def test_mix_loses_nothing() -> None:
    """Its inverse brings back every number, so no two counters share an output."""
    generator = np.random.default_rng(0)
    some = [0, 1, MASK, 1 << 63, (1 << 63) - 1, GOLDEN, *map(int, generator.integers(0, 2**64, 2000, dtype=np.uint64))]
    mixed = mix(torch.tensor([signed(x) for x in some]))
    assert [inverse_mix(x & MASK) for x in mixed.tolist()] == some


def test_bits_follow_the_stated_recipe() -> None:
    """The same hash in unsigned Python integers: torch's signed arithmetic and shifts change nothing.

    A change of this recipe breaks the exact continuation of every run that was ever saved.
    """
    seeds, name, steps, count = (0, 7, -3, 2**40), "sampler/0", (0, 1, 999_999), 5
    got = LaneRandom(seeds).bits(name, count, torch.tensor(steps))
    for (i, step), (lane, seed) in itertools.product(enumerate(steps), enumerate(seeds)):
        hashed = plain_mix((seed * GOLDEN) & MASK)
        key = plain_mix((plain_mix(hashed ^ _name_key(name)) + step * 0xD1B54A32D192ED03) & MASK)
        expected = [signed(plain_mix((key + k * GOLDEN) & MASK)) for k in range(1, count + 1)]
        assert got[i, lane].tolist() == expected


# ---- laws -----------------------------------------------------------------------------------------------------


def chi_square(index: np.ndarray, bins: int) -> float:
    """p-value of the hypothesis that all bins are equally likely."""
    return float(stats.chisquare(np.bincount(index, minlength=bins)).pvalue)


@pytest.mark.parametrize("seed", [0, 1, 123456789])
def test_uniforms_are_uniform(seed: int) -> None:
    u = LaneRandom([seed]).uniform("u", (1 << 19,)).numpy()[0]
    assert u.min() >= 0
    assert u.max() < 1
    assert chi_square((u * 1024).astype(int), 1024) > P_VALUE
    assert stats.kstest(u, "uniform").pvalue > P_VALUE
    # Neighbouring draws fill the unit square evenly, and the ten lowest of the 53 bits are fair too.
    square = (u[::2] * 32).astype(int) * 32 + (u[1::2] * 32).astype(int)
    assert chi_square(square, 1024) > P_VALUE
    low = (u * 2**53).astype(np.int64) % 2**10
    assert chi_square(low, 1024) > P_VALUE


def test_every_bit_is_fair_and_uncorrelated_with_the_others() -> None:
    n = 1 << 15
    bits = LaneRandom([0]).bits("b", n).numpy()[0].view(np.uint64)
    table = ((bits[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)).astype(np.float64) * 2 - 1
    bound = 5.5 / math.sqrt(n)  # 2016 pairs: the largest of so many normals stays below 4.5 deviations
    assert np.abs(table.mean(0)).max() < bound
    correlation = table.T @ table / n - np.eye(64)
    assert np.abs(correlation).max() < bound


def test_uniforms_of_successive_updates_are_uniform() -> None:
    """The same element over many updates: what a batch's first row, or an epsilon, sees of the stream."""
    u = LaneRandom([5]).uniform("u", (1,), torch.arange(1, 200_001)).numpy().ravel()
    assert chi_square((u * 256).astype(int), 256) > P_VALUE
    pairs = (u[::2] * 16).astype(int) * 16 + (u[1::2] * 16).astype(int)
    assert chi_square(pairs, 256) > P_VALUE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normals_are_normal(dtype: torch.dtype) -> None:
    n = 400_001  # odd: half of the last pair is dropped
    z = LaneRandom([2]).normal("z", torch.empty(1, n, dtype=dtype)).double().numpy()[0]
    assert len(z) == n
    assert np.isfinite(z).all()
    assert np.abs(z).max() < 6.8
    # Mean, variance, skewness and kurtosis against their sampling deviations.
    deviations = [
        z.mean() * math.sqrt(n),
        (z.var() - 1) * math.sqrt(n / 2),
        stats.skew(z) * math.sqrt(n / 6),
        stats.kurtosis(z) * math.sqrt(n / 24),
    ]
    assert np.abs(deviations).max() < 4
    assert stats.kstest(z, "norm").pvalue > P_VALUE
    beyond = (np.abs(z) > 3.5).sum()
    assert stats.binomtest(int(beyond), n, 2 * stats.norm.sf(3.5)).pvalue > P_VALUE
    # The two normals of one pair: uncorrelated, and so are their squares (a wrong radius or angle shows there).
    half = (n + 1) // 2
    a, b = z[: n - half], z[half:]
    for x, y in ((a, b), (a**2, b**2)):
        assert abs(np.corrcoef(x, y)[0, 1]) < 5 / math.sqrt(half)


@pytest.mark.parametrize("high", [1, 2, 7, 1000])
def test_integers_stay_in_range_and_are_unbiased(high: int) -> None:
    drawn = LaneRandom([4]).integers("i", high, (300, 300)).numpy().ravel()
    assert drawn.min() == 0
    assert drawn.max() == high - 1
    if high > 1:
        assert chi_square(drawn, high) > P_VALUE


def test_integers_of_huge_ranges_are_spread_over_all_of_it() -> None:
    high = 2**40 + 1
    drawn = LaneRandom([4]).integers("i", high, (200_000,)).numpy().ravel()
    assert drawn.max() < high
    assert chi_square((drawn * 1000 // high).astype(int), 1000) > P_VALUE
    assert chi_square(drawn % 1000, 1000) > P_VALUE  # the low digits too


# ---- streams --------------------------------------------------------------------------------------------------


def test_a_lane_does_not_see_the_lanes_beside_it() -> None:
    seeds = (3, 0, 99)
    steps = torch.tensor([1, 17])
    together = LaneRandom(seeds)
    for lane, seed in enumerate(seeds):
        alone = LaneRandom([seed])
        assert torch.equal(together.uniform("u", (4, 5), steps)[:, lane], alone.uniform("u", (4, 5), steps)[:, 0])
        like = torch.empty(3, 6, 2)
        assert torch.equal(together.normal("z", like)[lane], alone.normal("z", like[:1])[0])
        assert torch.equal(together.integers("i", 9, (8,))[lane], alone.integers("i", 9, (8,))[0])


def test_many_updates_at_once_equal_one_by_one() -> None:
    random = LaneRandom([1, 2])
    steps = torch.arange(5, 25)
    uniform, integers = random.uniform("u", (3, 2), steps), random.integers("i", 1000, (7,), steps)
    for i, step in enumerate(steps.tolist()):
        random.step.fill_(step)
        assert torch.equal(uniform[i], random.uniform("u", (3, 2)))
        assert torch.equal(integers[i], random.integers("i", 1000, (7,)))


def test_looking_ahead_changes_no_number() -> None:
    """Normals made for a block of updates at once are those of each update by itself."""
    ahead, plain, like = LaneRandom([1, 2]), LaneRandom([1, 2]), torch.empty(2, 5, 3)
    for first, count in ((1, 3), (4, 1), (5, 4)):
        ahead.look_ahead(first, count)
        for step in range(first, first + count):
            plain.step.fill_(step)
            assert ahead.step == step
            for name, shape in (("a", like), ("b", like), ("a", like[:, :2]), ("a", like.double())):
                assert torch.equal(ahead.normal(name, shape), plain.normal(name, shape))
            assert torch.equal(ahead.uniform("u", (4,)), plain.uniform("u", (4,)))
            ahead.advance()
    ahead.look_ahead(3, 0)
    plain.step.fill_(3)
    assert torch.equal(ahead.normal("a", like), plain.normal("a", like))


def test_a_loop_that_goes_one_by_one_gets_the_same_numbers() -> None:
    """Forwards past the block that is made at once, back into it, to before it, and far away."""
    loop, plain, like = LaneRandom([1, 2]), LaneRandom([1, 2]), torch.empty(2, 5, 3)
    for step in (*range(7, 150), 149, 90, 7, 3, 4, 10**9, 5):
        loop.go_to(step)
        plain.step.fill_(step)
        assert loop.step == step
        assert torch.equal(loop.normal("a", like), plain.normal("a", like))
        assert torch.equal(loop.uniform("u", (4,)), plain.uniform("u", (4,)))
        for shape in ((4,), (2, 4)):
            assert torch.equal(loop.uniform("u", shape, torch.tensor([step]))[0], plain.uniform("u", shape))


def test_the_first_elements_do_not_depend_on_how_many_are_drawn() -> None:
    random = LaneRandom([1])
    assert torch.equal(random.uniform("u", (10,)), random.uniform("u", (1000,))[:, :10])


def test_a_draw_depends_on_the_update_and_on_nothing_before_it() -> None:
    random, like = LaneRandom([6]), torch.empty(1, 4, 3)
    random.step.fill_(10)
    first = random.normal("z", like)
    random.uniform("u", (1000,))
    random.step.fill_(11)
    assert not torch.equal(first, random.normal("z", like))
    random.step.fill_(10)
    assert torch.equal(first, random.normal("z", like))


def test_streams_of_seeds_names_and_updates_are_uncorrelated_and_never_overlap() -> None:
    """Neighbouring seeds, similar names and successive updates: the places where counters could run into each other."""
    seeds, names, steps, n = (0, 1, 2, 1000), ("sampler/0", "sampler/1", "target_action", ""), (0, 1, 2, 3), 4096
    random = LaneRandom(seeds)
    bits = torch.stack([random.bits(name, n, torch.tensor(steps)) for name in names])
    assert bits.unique().numel() == bits.numel()  # 262,144 numbers of 64 bits: a chance match has odds of 2e-9
    u = ((bits.reshape(-1, n) >> 11) & (2**53 - 1)).double() * 2.0**-53
    streams = u.shape[0]
    correlation = torch.corrcoef(u) - torch.eye(streams, dtype=torch.float64)
    assert correlation.abs().max() < 5.5 / math.sqrt(n)  # 2016 pairs
    shifted = torch.corrcoef(torch.cat([u[:, 1:], u[:, :-1]]))[:streams, streams:]
    assert shifted.abs().max() < 5.5 / math.sqrt(n)
