"""The index of nearest state-action pairs against brute force in float64, and what must hold of every answer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor

from offrl.nets import neighbors, neighbors_cpu
from offrl.nets.neighbors import Blocks, Neighbors, OnProcessor, brute_force
from offrl.utils.errors import OffrlError


def walks(n: int, width: int = 17, action_dim: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Standardised states of smooth random trajectories and actions that follow them: near states in plenty."""
    g = torch.Generator().manual_seed(seed)
    steps = torch.randn(n, width, generator=g) * torch.linspace(0.5, 0.02, width)
    states = steps.cumsum(0).sin() + 0.05 * torch.randn(n, width, generator=g)
    actions = (states[:, :action_dim] * 0.5 + 0.3 * torch.randn(n, action_dim, generator=g)).clamp(-1, 1)
    return (states - states.mean(0)) / (states.std(0) + 1e-3), actions


def clusters(n: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    centres = 5 * torch.randn(7, 5, generator=g)
    states = centres[torch.randint(7, (n,), generator=g)] + 0.01 * torch.randn(n, 5, generator=g)
    return states, torch.rand(n, 2, generator=g) * 2 - 1


def duplicated(n: int) -> tuple[Tensor, Tensor]:
    """Every state occurs about ten times, every pair about three times."""
    states, actions = walks(n, 4, 2)
    pick = torch.arange(n) % (n // 10)
    return states[pick], actions[(torch.arange(n) // 3) % (n // 10)]


def with_constants(n: int) -> tuple[Tensor, Tensor]:
    """Dimensions that never change, in states and in actions."""
    states, actions = walks(n, 6, 3)
    states[:, [0, 4]], actions[:, 1] = 0.0, 0.5
    return states, actions


def all_equal(n: int) -> tuple[Tensor, Tensor]:
    return torch.ones(n, 3), torch.linspace(-1, 1, n).unsqueeze(1)


def far_from_zero(n: int) -> tuple[Tensor, Tensor]:
    """Raw observations with a large offset, where float32 products lose most digits."""
    states, actions = walks(n, 5, 2)
    return states + 300.0, actions


DATASETS = {
    "walks": walks(3000),
    "clusters": clusters(2000),
    "duplicated": duplicated(1200),
    "constants": with_constants(1500),
    "equal states": all_equal(400),
    "offset": far_from_zero(1500),
    "few rows": walks(5, 3, 2),
    "one row": walks(2, 3, 2),
}


def policy(actions: Tensor, rows: Tensor, stray: float, seed: int = 3) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (actions[rows] + stray * torch.randn(*rows.shape, actions.shape[1], generator=g)).clamp(-1, 1)


def backends(states: Tensor, actions: Tensor) -> dict[str, object]:
    small = Blocks(states.float(), actions.float(), block=257, candidates=4, doubtful=3)
    return {"tree": OnProcessor(states.float(), actions.float(), keep=False), "blocks": small}


@pytest.mark.parametrize("stray", [0.05, 1.0])
@pytest.mark.parametrize("beta", [0.0, 1e-3, 0.5, 2.0, 7.5, 1e3])
@pytest.mark.parametrize("name", DATASETS)
def test_distances_equal_brute_force(name: str, beta: float, stray: float) -> None:
    """Both backends, k = 1 and 3: the float64 distance to 1e-12 of its size, which is what summing in another order costs."""
    states, actions = DATASETS[name]
    rows = torch.randint(len(states), (48,), generator=torch.Generator().manual_seed(0))
    asked = policy(actions, rows, stray)
    for k in (1, 3):
        if k > len(states):
            continue
        _, expected = brute_force(states, actions, states[rows], asked, beta, k)
        for backend_name, backend in backends(states, actions).items():
            betas = torch.full((48,), beta, dtype=torch.float64)
            found, distance, _ = backend.query(rows, asked, betas, k, None)  # type: ignore[attr-defined]
            torch.testing.assert_close(distance, expected, rtol=1e-12, atol=1e-12, msg=f"{backend_name}, k={k}")
            square = beta**2 * (states[found].double() - states[rows].double()).square().sum(-1)
            square += (actions[found].double() - asked.double()).square().sum(-1)
            torch.testing.assert_close(square.sqrt(), expected, rtol=1e-12, atol=1e-12, msg=f"{backend_name}: row")


def test_huge_beta_names_the_own_row() -> None:
    """beta = 1e6 on distinct states: PRDC is TD3+BC, however far the policy strays (invariant 1 of the method)."""
    states, actions = DATASETS["walks"]
    rows = torch.arange(0, 3000, 7).unsqueeze(0)
    for backend in backends(states, actions).values():
        betas = torch.full((rows.numel(),), 1e6, dtype=torch.float64)
        found, _, _ = backend.query(rows[0], policy(actions, rows[0], 1.0), betas, 1, None)  # type: ignore[attr-defined]
        assert torch.equal(found, rows[0])


def test_bounds_that_hold_for_every_answer() -> None:
    """d <= R, beta |s_i - s_j| <= R, and the action part never exceeds R: lemmas 1 to 3 of the geometry."""
    states, actions = DATASETS["walks"]
    index = Neighbors(states, actions, keep=False)
    rows = torch.randint(3000, (2, 100), generator=torch.Generator().manual_seed(5))
    asked = policy(actions, rows, 0.7)
    own = (asked - actions[rows]).double().norm(dim=-1)
    for beta in (0.3, 2.0):
        found = index.query(rows, asked, beta)
        apart = (states[rows] - states[found.rows]).double().norm(dim=-1)
        pull = (asked - actions[found.rows]).double().norm(dim=-1)
        slack = 1 + 1e-6
        assert (found.distance <= own * slack).all()
        assert (beta * apart <= own * slack).all()
        assert (pull <= own * slack).all()


def test_the_answer_moves_with_beta() -> None:
    """The action part never falls, and the state part never rises, when states weigh more (an exchange argument)."""
    states, actions = DATASETS["walks"]
    index = Neighbors(states, actions, keep=False)
    rows = torch.arange(0, 3000, 31).unsqueeze(0)
    asked = policy(actions, rows, 0.8)
    pulls, aparts = [], []
    for beta in (0.0, 0.1, 0.5, 1.0, 2.0, 5.0, 20.0):
        near = index.query(rows, asked, beta).rows
        pulls.append((asked - actions[near]).norm(dim=-1))
        aparts.append((states[rows] - states[near]).norm(dim=-1))
    assert (torch.stack(pulls).diff(dim=0) >= -1e-6).all()
    assert (torch.stack(aparts).diff(dim=0) <= 1e-6).all()
    assert (pulls[0] < pulls[-1] - 0.1).any()  # the grid does see both ends


def test_a_row_that_plays_its_own_action_is_its_own_neighbour() -> None:
    states, actions = DATASETS["clusters"]
    rows = torch.arange(2000).unsqueeze(0)
    found = Neighbors(states, actions, keep=False).query(rows, actions[rows], 2.0)
    assert torch.equal(found.rows, rows)
    assert (found.distance == 0).all()


@pytest.mark.parametrize("beta", [-1.0, 3e19, float("nan"), float("inf")])
def test_a_weight_of_states_that_float32_cannot_square_is_refused(beta: float) -> None:
    """From 1.8e19 its square is infinite, and times a distance of 0 no number: a wrong row would be found silently."""
    states, actions = walks(64)
    rows = torch.arange(8).view(1, 8)
    with pytest.raises(OffrlError, match=r"beta=.* should be between 0 and 1e\+15; set agent\.beta"):
        Neighbors(states, actions).query(rows, actions[rows], beta)
    found = Neighbors(states.repeat(3, 1), actions.repeat(3, 1)).query(rows, actions[rows], 1e15)
    assert torch.equal(found.distance, torch.zeros(1, 8, dtype=torch.float64))


def test_lanes_share_an_index_and_may_differ_in_beta() -> None:
    states, actions = DATASETS["walks"]
    index = Neighbors(states, actions, keep=False)
    rows = torch.randint(3000, (3, 40), generator=torch.Generator().manual_seed(6))
    asked = policy(actions, rows, 0.6)
    together = index.query(rows, asked, torch.tensor([0.2, 2.0, 9.0]))
    for lane, beta in enumerate((0.2, 2.0, 9.0)):
        alone = index.query(rows[lane : lane + 1], asked[lane : lane + 1], torch.tensor([beta]))
        assert torch.equal(together.rows[lane], alone.rows[0])


def test_threads_change_nothing() -> None:
    states, actions = DATASETS["walks"]
    rows = torch.randint(3000, (1, 700), generator=torch.Generator().manual_seed(7))
    asked = policy(actions, rows, 1.5)
    before = torch.get_num_threads()
    try:
        answers = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            answers.append(Neighbors(states, actions, keep=False).query(rows, asked, 0.3))
    finally:
        torch.set_num_threads(before)
    assert (~answers[0].from_list).sum() > 3 * neighbors._SHARE  # enough open searches for three threads
    assert torch.equal(answers[0].rows, answers[1].rows)
    assert torch.equal(answers[0].distance, answers[1].distance)


def test_order_of_the_rows_does_not_matter() -> None:
    states, actions = DATASETS["walks"]
    order = torch.randperm(3000, generator=torch.Generator().manual_seed(8))
    rows = torch.arange(0, 3000, 11).unsqueeze(0)
    asked = policy(actions, rows, 0.6)
    straight = Neighbors(states, actions, keep=False).query(rows, asked, 2.0)
    mixed = Neighbors(states[order], actions[order], keep=False).query(order.argsort()[rows], asked, 2.0)
    assert torch.equal(order[mixed.rows], straight.rows)


@pytest.mark.parametrize("backend", ["tree", "blocks"])
def test_states_that_are_no_rows(backend: str) -> None:
    """A row of -1 asks about a state that is given: rows of another source than the dataset."""
    states, actions = DATASETS["walks"]
    new_states, new_actions = walks(60, seed=9)
    rows = torch.where(torch.arange(60) % 2 == 0, -1, torch.arange(60))
    of_row = torch.where((rows < 0).unsqueeze(1), new_states, states[rows])
    for beta, k in ((0.5, 1), (2.0, 1), (2.0, 4)):
        _, expected = brute_force(states, actions, of_row, new_actions, beta, k)
        betas = torch.full((60,), beta, dtype=torch.float64)
        _, distance, _ = backends(states, actions)[backend].query(rows, new_actions, betas, k, new_states)  # type: ignore[attr-defined]
        torch.testing.assert_close(distance, expected, rtol=1e-12, atol=1e-12)


def test_lists_hold_the_nearest_other_states() -> None:
    """Against all distances: no state outside a list is nearer than the list's last distance, itself a lower bound."""
    states, actions = DATASETS["duplicated"]
    index = OnProcessor(states, actions, keep=False)
    order = torch.from_numpy(index.order)
    apart = torch.cdist(states[order].double(), states[order].double(), compute_mode="donot_use_mm_for_euclid_dist")
    apart.fill_diagonal_(torch.inf)
    expected = apart.sort(1).values[:, : neighbors.LIST_LENGTH]
    kept = torch.from_numpy(index.tree.near_distance).double()
    # cdist sums in another order, to 1e-15; lists are rounded down by some 1e-7 of their size.
    assert (kept <= expected + 1e-12).all()
    torch.testing.assert_close(kept, expected, rtol=1e-6, atol=1e-12)
    assert (index.tree.near != np.arange(len(order))[:, None]).all()


def test_the_list_settles_what_stays_close_and_the_tree_the_rest() -> None:
    states, actions = DATASETS["walks"]
    index = Neighbors(states, actions, keep=False)
    rows = torch.arange(3000).unsqueeze(0)
    close = index.query(rows, policy(actions, rows, 0.02), 2.0)
    astray = index.query(rows, policy(actions, rows, 1.5), 0.3)
    assert close.from_list.float().mean() > 0.9
    assert astray.from_list.float().mean() < 0.3


def test_blocks_certify_or_look_again() -> None:
    """With an offset float32 can't tell neighbours apart: its doubt is seen, and float64 resolves it."""
    states, actions = DATASETS["offset"]
    rows = torch.arange(48)
    asked = policy(actions, rows, 0.3)
    betas = torch.full((48,), 2.0, dtype=torch.float64)
    blocks = Blocks(states, actions, candidates=2)
    _, _, doubt = blocks._pass(states[rows], asked, betas, 1, torch.float32)
    assert not (doubt > 0).all()
    near_offset = Blocks(states, actions, candidates=2)
    near_offset.centre = torch.zeros_like(near_offset.centre)  # without centring the products cancel
    near_offset.table = torch.cat([states, actions, states.square().sum(1, keepdim=True), _squares(actions)], 1)
    near_offset.longest = states.norm(dim=1).max().double(), actions.norm(dim=1).max().double()
    _, _, doubt = near_offset._pass(states[rows], asked, betas, 1, torch.float32)
    assert (doubt > 0).all()
    _, distance, from_list = near_offset.query(rows, asked, betas, 1, None)
    assert from_list.all()
    _, expected = brute_force(states, actions, states[rows], asked, 2.0)
    torch.testing.assert_close(distance, expected, rtol=1e-12, atol=1e-12)


def test_lower_precision_around_does_not_reach_the_index() -> None:
    """Training in bfloat16 wraps the update in autocast, under which products would lose what the bounds count on."""
    states, actions = DATASETS["walks"]
    rows = torch.arange(0, 3000, 50).unsqueeze(0)
    asked = policy(actions, rows, 0.5)
    index = Neighbors(states, actions, keep=False)
    index.backend, index.blocks = None, Blocks(states, actions)  # as on a GPU
    _, expected = brute_force(states, actions, states[rows[0]], asked[0], 2.0)
    with torch.autocast("cpu", torch.bfloat16):
        found = index.query(rows, asked, 2.0)
    torch.testing.assert_close(found.distance[0], expected, rtol=1e-12, atol=1e-12)


def _squares(rows: Tensor) -> Tensor:
    return rows.square().sum(1, keepdim=True)


def test_the_index_is_kept_and_found_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OFFRL_HOME", str(tmp_path))
    monkeypatch.setattr(neighbors, "_KEPT_FROM", 100)
    states, actions = DATASETS["walks"]
    rows = torch.arange(0, 3000, 13).unsqueeze(0)
    asked = policy(actions, rows, 0.6)
    first = Neighbors(states, actions).query(rows, asked, 2.0)
    [path] = (tmp_path / "neighbors").iterdir()
    kept = path.read_bytes()

    def never(*_: object) -> None:
        raise AssertionError("built although it was kept")

    with monkeypatch.context() as patch:
        patch.setattr(OnProcessor, "_build", never)
        second = Neighbors(states, actions).query(rows, asked, 2.0)
    assert torch.equal(first.rows, second.rows)
    flipped = bytearray(kept)
    flipped[-5] ^= 64  # row numbers lead out of the arrays
    for damaged in (kept[: len(kept) // 2], bytes(flipped)):
        path.write_bytes(damaged)
        with pytest.warns(UserWarning, match="built again"):
            third = Neighbors(states, actions).query(rows, asked, 2.0)
        assert torch.equal(first.rows, third.rows)
        assert path.read_bytes() == kept
    Neighbors(states + 1, actions)
    assert len(list((tmp_path / "neighbors").iterdir())) == 2  # other states, another index


def test_a_full_disk_keeps_no_index_and_stops_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(parts: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"the first bytes")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.warns(UserWarning, match="No space left on device.*the index is not kept"):
        neighbors._write(tmp_path / "index.safetensors", {})
    assert list(tmp_path.iterdir()) == []


def test_memory_stays_below_three_datasets() -> None:
    states, actions = walks(20_000)
    index = OnProcessor(states, actions, keep=False)
    dataset = 4 * 20_000 * (2 * 17 + 6 + 2)  # observations, next ones, actions, rewards, terminations in float32
    assert index.nbytes <= 3 * dataset


def test_bad_input_gets_a_sentence() -> None:
    states, actions = DATASETS["few rows"]
    index = Neighbors(states, actions)
    with pytest.raises(OffrlError, match="k=6"):
        index.query(torch.zeros(1, 2, dtype=torch.int64), actions[:2].unsqueeze(0), 2.0, k=6)
    with pytest.raises(OffrlError, match="continuous"):
        Neighbors(states, torch.zeros(5, dtype=torch.int64))
    with pytest.raises(OffrlError, match="finite"):
        Neighbors(states.clone().fill_(torch.nan), actions)


def test_a_dataset_of_one_row_has_that_answer() -> None:
    index = Neighbors(torch.tensor([[0.5, -1.0]]), torch.tensor([[0.25]]))
    found = index.query(torch.tensor([[0]]), torch.tensor([[[1.0]]]), 2.0)
    assert (found.rows.flatten().tolist(), found.distance.flatten().tolist()) == ([0], [0.75])


def test_leaves_are_full_and_hold_every_row() -> None:
    states, _ = walks(1000)
    turned, slip = neighbors_cpu.turn(states.numpy(), neighbors_cpu.principal_axes(states.numpy()))
    order = neighbors_cpu.leaf_order(turned)
    assert sorted(order) == list(range(1000))
    # An orthogonal turn leaves distances alone, up to the stated slip.
    before = np.linalg.norm(states.numpy()[:100, None].astype(float) - states.numpy()[None, 100:200], axis=-1)
    after = np.linalg.norm(turned[:100, None].astype(float) - turned[None, 100:200], axis=-1)
    assert np.abs(before - after).max() <= slip
    assert slip < 1e-5
