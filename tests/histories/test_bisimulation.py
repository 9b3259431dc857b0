"""The bisimulation loss against closed forms: known fixed points, known distances, and where its gradient goes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor

from offrl.nets import Adam
from offrl.nets.bisimulation import EncodingModels, Step, bisimulation_loss, distance_to_match, pairs, with_events

GAMMA = 0.9


def random_step(n: int = 7, width: int = 3, seed: int = 0) -> Step:
    g = torch.Generator().manual_seed(seed)
    z, mean = (torch.randn(1, n, width, generator=g).double() for _ in range(2))
    std = torch.rand(1, n, width, generator=g).double() + 0.1
    return Step(z, torch.randn(1, n, generator=g).double(), torch.ones(1, n).double(), mean, std)


def everyone(n: int) -> tuple[Tensor, Tensor]:
    """Both rows of all pairs, `[1, n n]` each."""
    return (x.reshape(1, -1) for x in torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij"))  # type: ignore[return-value]


def chain(states: int = 9) -> Step:
    """A walk to an absorbing last state with rewards that grow: z = V, and |V - V'| is the bisimulation metric itself.

    r and the next state's value rise together, so |V_i - V_j| = |r_i - r_j| + gamma |V_next(i) - V_next(j)|.
    """
    reward = torch.linspace(-1, 1, states).double() ** 3
    value = torch.zeros(states).double()
    successor = torch.arange(1, states + 1).clamp(max=states - 1)
    for _ in range(400):
        value = reward + GAMMA * value[successor]
    z, mean = value.view(1, -1, 1), value[successor].view(1, -1, 1)
    return Step(z, reward.view(1, -1), torch.ones(1, states).double(), mean, torch.zeros_like(mean))


def test_the_loss_is_zero_at_the_metrics_fixed_point() -> None:
    step = chain()
    a, b = everyone(9)
    left = step.at(a)
    target = distance_to_match(left, step.at(b), GAMMA)
    distance = (left.z - step.at(b).z).abs().squeeze(-1)
    torch.testing.assert_close(target, distance, rtol=0, atol=1e-12)
    for shift in range(1, 9):
        pair = torch.arange(9).roll(shift).unsqueeze(0)
        assert bisimulation_loss(step, pair, torch.ones(1, 9).double(), GAMMA).item() < 1e-20
    worse = Step(1.1 * step.z, step.reward, step.alive, step.mean, step.std)
    assert bisimulation_loss(worse, pair, torch.ones(1, 9).double(), GAMMA).item() > 1e-3


def test_the_target_is_a_contraction_of_the_distances() -> None:
    """sup |T d - T d'| <= gamma sup |d - d'| for the distances d, d' of two encodings of one random deterministic task."""
    g = torch.Generator().manual_seed(3)
    successor, reward = torch.randint(20, (20,), generator=g), torch.randn(1, 20, generator=g).double()
    a, b = everyone(20)
    matched, apart = [], []
    for seed in (1, 2):
        z = random_step(20, 4, seed).z
        step = Step(z, reward, torch.ones(1, 20).double(), z[:, successor], torch.zeros_like(z))
        matched.append(distance_to_match(step.at(a), step.at(b), GAMMA))
        apart.append((step.at(a).z - step.at(b).z).norm(dim=-1))
    ratio = (matched[0] - matched[1]).abs().max() / (apart[0] - apart[1]).abs().max()
    assert ratio <= GAMMA + 1e-9


def test_aliases_of_a_state_are_pulled_together() -> None:
    """Same reward, same successor: their distance to match is 0, and a step down the gradient brings their encodings closer."""
    z = torch.tensor([[[0.0, 1.0], [2.0, -1.0]]]).double().requires_grad_()
    same = torch.full((1, 2, 2), 0.3).double()
    step = Step(z, torch.ones(1, 2).double(), torch.ones(1, 2).double(), same, same)
    pair = torch.tensor([[1, 0]])
    assert distance_to_match(step, step.at(pair), GAMMA).abs().max() == 0
    (gradient,) = torch.autograd.grad(bisimulation_loss(step, pair, torch.ones(1, 2).double(), GAMMA).sum(), z)
    closer = z - 0.01 * gradient
    assert (closer[0, 0] - closer[0, 1]).norm() < (z[0, 0] - z[0, 1]).norm()


def test_it_is_symmetric_and_nothing_at_a_pair_of_one() -> None:
    step, n = random_step(), 7
    a, b = everyone(n)
    square = distance_to_match(step.at(a), step.at(b), GAMMA).view(n, n)
    torch.testing.assert_close(square, square.T)
    itself = torch.arange(n).unsqueeze(0)
    assert bisimulation_loss(step, itself, torch.ones(1, n).double(), GAMMA).item() == 0
    there = torch.tensor([[1, 2, 3, 4, 5, 6, 0]])
    back = there.argsort(-1)
    one, two = (bisimulation_loss(step, p, torch.ones(1, n).double(), GAMMA) for p in (there, back))
    torch.testing.assert_close(one, two)


@pytest.mark.parametrize(
    ("first", "second"), [((0.0, 1.0), (0.0, 1.0)), ((0.3, 0.5), (-1.0, 2.0)), ((1.0, 1e-4), (2.0, 3.0))]
)
def test_the_transport_distance_of_gaussians(first: tuple[float, float], second: tuple[float, float]) -> None:
    """In one dimension W_2^2 is the integral of the squared difference of the quantile functions."""
    u = (np.arange(200_000) + 0.5) / 200_000
    expected = np.sqrt(np.mean((norm.ppf(u, *first) - norm.ppf(u, *second)) ** 2))
    mean, std = (torch.tensor([first[i], second[i]]).double().view(1, 2, 1) for i in (0, 1))
    step = Step(torch.zeros_like(mean), torch.zeros(1, 2).double(), torch.ones(1, 2).double(), mean, std)
    pair = torch.tensor([[1, 0]])
    for metric in ("vector", "elementwise"):
        found = distance_to_match(step, step.at(pair), 1.0, metric).flatten()[0].item()
        assert abs(found - expected) < 1e-4  # the quadrature's error at the ends


def test_terminal_steps_compare_rewards_alone() -> None:
    step = random_step(4)
    alive = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).double()
    step = Step(step.z, step.reward, alive, step.mean, step.std)
    target = distance_to_match(step.at(torch.tensor([[0, 0]])), step.at(torch.tensor([[1, 2]])), GAMMA)[0]
    gap = (step.reward[0, 0] - step.reward[0, 1:3]).abs()
    assert target[0] == gap[0]
    norm_of_both = (step.mean[0, 2].square() + step.std[0, 2].square()).sum().sqrt()
    torch.testing.assert_close(target[1], gap[1] + GAMMA * norm_of_both)


def test_only_encodings_get_a_gradient() -> None:
    models = EncodingModels((0, 1), 3, 2, 8).double()
    z = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    reward = torch.zeros(2, 6).double().requires_grad_()
    mean, std = models.next_encoding(z, torch.zeros(2, 6, 2).double())
    loss = bisimulation_loss(Step(z, reward, torch.ones(2, 6).double(), mean, std), torch.arange(6).roll(1).expand(2, -1),
                             torch.ones(2, 6).double(), GAMMA)  # fmt: skip
    gradients = torch.autograd.grad(loss.sum(), [z, reward, *models.parameters()], allow_unused=True)
    assert gradients[0] is not None
    assert all(g is None for g in gradients[1:])


def test_scaled_rewards_scale_the_metric() -> None:
    step, pair = random_step(), torch.arange(7).roll(2).unsqueeze(0)
    large = Step(3 * step.z, 3 * step.reward, step.alive, 3 * step.mean, 3 * step.std)
    one, nine = (bisimulation_loss(s, pair, torch.ones(1, 7).double(), GAMMA) for s in (step, large))
    torch.testing.assert_close(9 * one, nine)


def test_elementwise_distances_and_slope_as_written_out() -> None:
    step, pair = random_step(), torch.arange(7).roll(3)
    total = {"vector": 0.0, "elementwise": 0.0}
    for i, j in enumerate(pair.tolist()):
        z, m, s = ((x[0, i] - x[0, j]).abs().numpy() for x in (step.z, step.mean, step.std))
        gap = abs(float(step.reward[0, i] - step.reward[0, j]))
        short = gap + GAMMA * np.sqrt((m**2).sum() + (s**2).sum()) - np.sqrt((z**2).sum())
        total["vector"] += 2 * (0.7 if short > 0 else 0.3) * short**2 / 7
        near = np.where(z < 1, z**2 / 2, z - 0.5)
        each = gap + GAMMA * np.sqrt(m**2 + s**2) - near
        total["elementwise"] += float(np.mean(2 * np.where(each > 0, 0.7, 0.3) * each**2)) / 7
    for metric, expected in total.items():
        valid = torch.ones(1, 7).double()
        found = bisimulation_loss(step, pair.unsqueeze(0), valid, GAMMA, metric, slope=0.7)  # type: ignore[arg-type]
        torch.testing.assert_close(found.item(), expected)


def test_pairs_are_a_cycle_within_the_groups() -> None:
    uniform = torch.rand(2, 50, generator=torch.Generator().manual_seed(0)).double()
    pair, valid = pairs(uniform)
    assert (pair.sort(-1).values == torch.arange(50)).all()
    assert (pair != torch.arange(50)).all()
    assert (valid == 1).all()
    group = torch.randint(4, (2, 50), generator=torch.Generator().manual_seed(1))
    pair, valid = pairs(uniform, group)
    assert (group.gather(1, pair) == group)[valid > 0].all()
    assert ((valid == 0).sum(-1) == 4).all()  # one pair between a group and the next


def test_rare_events_are_in_their_share_of_the_pairs() -> None:
    """Two events of 64 rows in the first lane, none in the second, half of them in the third; 400 draws."""
    g = torch.Generator().manual_seed(0)
    event = torch.zeros(3, 64, dtype=torch.bool)
    event[0, [5, 40]], event[2, ::2] = True, True
    share, draws = torch.tensor([0.25, 0.25, 0.25]), 400
    found = torch.zeros(3)
    for _ in range(draws):
        rows = with_events(torch.rand(3, 64, generator=g), event, share)
        pair, _ = pairs(torch.rand(3, 64, generator=g))
        held = event.gather(1, rows)
        found += (held | held.gather(1, pair)).double().mean(-1) / draws
    assert found[0] > 0.25
    # nine places and row 40 itself: 10 of 64 rows hold an event
    assert abs(found[0] - (1 - 54 / 64 * 53 / 63)) < 0.01
    assert found[1] == 0
    assert found[2] >= 1 - 0.5**2
    rows = with_events(torch.rand(3, 64, generator=g), event, 0.25)
    counts = [(rows[0, :9] == number).sum().item() for number in (5, 40)]
    assert sorted(counts) == [4, 5]  # each as often as the others
    assert (rows[:, 9:] == torch.arange(9, 64)).all()
    assert (rows[1] == torch.arange(64)).all()
    assert (with_events(torch.rand(3, 64, generator=g), event, 0.0) == torch.arange(64)).all()


def test_the_std_of_the_next_encoding_is_bounded_and_about_one_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    models = EncodingModels((0,), 2, 1, 8)
    raw = torch.tensor([[[5.0, -5.0, 0.0, 2.0], [0.0, 0.0, -1e4, 1e4]]])
    monkeypatch.setattr(models.transition, "forward", lambda x: raw)
    mean, std = models.next_encoding(torch.zeros(1, 2, 2), torch.zeros(1, 2, 1))
    assert mean.tolist() == [[[5.0, -5.0], [0.0, 0.0]]]
    by_hand = [1e-4 + (10 - 1e-4) / (1 + 9 * np.exp(-x)) for x in (0.0, 2.0)]
    assert std[0, 0].tolist() == pytest.approx(by_hand)
    assert std[0, 1].tolist() == pytest.approx([1e-4, 10.0])


@pytest.mark.slow
def test_the_models_learn_a_linear_task() -> None:
    """z' = z + a with noise 0.1, r = sum z: the likelihood tends to that of the truth, 0.5 + log 0.1 per dimension."""
    g = torch.Generator().manual_seed(0)
    models = EncodingModels((0,), 2, 2, 64)
    optimizer = Adam(models.parameters(), 3e-3)
    for _ in range(600):
        z, a = (torch.randn(1, 128, 2, generator=g) for _ in range(2))
        next_z = z + a + 0.1 * torch.randn(1, 128, 2, generator=g)
        losses = models.loss(z, a, z.sum(-1), next_z, torch.ones(1, 128))
        optimizer.step(losses["transition_loss"] + losses["reward_loss"])
    assert losses["reward_loss"].item() < 0.05
    assert abs(losses["transition_loss"].item() - (0.5 + np.log(0.1))) < 0.4
