"""The exact nearest state-action pair of a dataset, for queries whose state is one of its rows.

PRDC (Ran et al. 2023) searches, for a row i and the policy's action pi there, the row j that minimises
`beta^2 |s_i - s_j|^2 + |pi - a_j|^2`. The search is exact: the distance equals that of `brute_force` in float64; only the
choice among equally near rows may differ. The CPU searches a tree of boxes (`offrl.nets.neighbors_cpu`). A GPU finds a few
candidates by blocked matrix products and computes their distances again in float64; a bound on the rounding error certifies
the result (`Blocks`).

The index depends on the states alone, so one index serves every beta, k, policy, seed and lane. It is cached beside the
datasets, under a hash of the states.
"""

from __future__ import annotations

import hashlib
import sys
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from offrl.nets import no_compile
from offrl.nets.tape import outside
from offrl.utils.errors import OffrlError
from offrl.utils.paths import cache_dir, replacing

LIST_LENGTH = 8  # number of nearest states kept for each row
_VERSION = "2"  # version of the cached file's layout and content
_KEPT_FROM = 20_000  # smallest number of rows whose index is cached; below it, rebuilding is fast enough
_CHUNK = 256  # number of rows whose lists are made in one call
_LARGEST_BETA = 1e15  # so that its square is far below the largest float32
_SHARE = 48  # smallest number of searches per thread: waking a thread costs as much as a few searches


class NeighborResult(NamedTuple):
    """`rows` int64, `distance` float64 (not squared), `from_list` bool (see `Neighbors.query`), all shaped as the queries."""

    rows: Tensor
    distance: Tensor
    from_list: Tensor


def brute_force(
    states: Tensor, actions: Tensor, query_states: Tensor, query_actions: Tensor, beta: float, k: int = 1
) -> tuple[Tensor, Tensor]:
    """Reference for the index: rows and distances `[Q]` of the k-th nearest pairs, computed in float64.

    Args:
        states, actions: `[N, S]`, `[N, A]`, the dataset; query_states, query_actions: `[Q, S]`, `[Q, A]`.
    """
    rows, distances = [], []
    for s, a in zip(query_states.double(), query_actions.double()):
        square = beta**2 * (states.double() - s).square().sum(-1) + (actions.double() - a).square().sum(-1)
        near, row = square.topk(k, largest=False, sorted=True)
        rows.append(row[-1])
        distances.append(near[-1].sqrt())
    return torch.stack(rows), torch.stack(distances)


class Neighbors:
    """The index of a dataset's state-action pairs.

    Args:
        states: `[N, S]`, standardised as the method needs them; float64 is rounded to float32.
        actions: `[N, A]`, on the same device.
        keep: whether to read the index from the cache and to write it there.

    Memory: on the processor 1.3 to 3 times the dataset's own, the more the fewer its dimensions; on a GPU a float32 copy
    of states and actions.
    """

    def __init__(self, states: Tensor, actions: Tensor, keep: bool = True) -> None:
        if actions.ndim != 2:
            raise OffrlError("nearest pairs need continuous actions; choose another agent for discrete ones.")
        self.states, self.actions = states.float().contiguous(), actions.float().contiguous()
        if not bool(self.states.isfinite().all() and self.actions.isfinite().all()):
            raise OffrlError("nearest pairs need finite observations and actions; look at the data.")
        self.backend = OnProcessor(self.states, self.actions, keep) if states.device.type == "cpu" else None
        self.blocks = None if self.backend else Blocks(self.states, self.actions)

    def __len__(self) -> int:
        return len(self.states)

    @torch.no_grad()
    def query(
        self, rows: Tensor, actions: Tensor, beta: float | Tensor, k: int = 1, states: Tensor | None = None
    ) -> NeighborResult:
        """The k-th nearest pair to each (beta s, a).

        Args:
            rows: `[lanes, batch]` int64, rows of the dataset whose states are the queries' states.
            actions: `[lanes, batch, A]`, the policy's actions.
            beta: weight of states, at least 0; one number, or one per lane.
            k: rank of the neighbour, 1 for the nearest (the row's own pair counts); only the k-th is returned.
            states: `[lanes, batch, S]`, the queries' states where `rows` is -1.

        Returns:
            rows, distances, and `from_list`. On the CPU: whether the row's list of near states gave the result, the
            cheapest case. On a GPU: whether the result is certified (see `Blocks` for when it may not be).
        """
        if not 1 <= k <= len(self):
            raise OffrlError(f"k={k} asks for more neighbours than the dataset's {len(self)} rows; lower agent.k.")
        betas = torch.as_tensor(beta, dtype=torch.float64, device=rows.device).expand(len(rows))
        betas = betas.unsqueeze(1).expand(rows.shape).reshape(-1)
        flat = None if states is None else states.reshape(-1, states.shape[-1]).float().contiguous()
        # Contiguous, since the compiled kernels are made for one layout.
        flat_actions = actions.reshape(-1, actions.shape[-1]).float().contiguous()
        backend = self.backend or self.blocks
        assert backend is not None
        with torch.autocast(rows.device.type, enabled=False):  # bounds on rounding hold for float32 products
            found = backend.query(rows.reshape(-1), flat_actions, betas, k, flat)
        return NeighborResult(*(part.view(rows.shape) for part in found))


no_compile(Neighbors, "query")


# ---- processor -----------------------------------------------------------------------------------------------


class OnProcessor:
    """The tree of `offrl.nets.neighbors_cpu`, over as many threads as PyTorch uses."""

    def __init__(self, states: Tensor, actions: Tensor, keep: bool = True) -> None:
        from offrl.nets import neighbors_cpu as kernels

        self.kernels = kernels
        plain = states.numpy()
        path = _path(plain) if keep and len(plain) >= _KEPT_FROM else None
        parts = _read(path, *plain.shape) if path else None
        if parts is None:
            parts = self._build(plain, path)
            if path:
                _write(path, parts)
        self.order = parts["order"].astype(np.int64)
        self.place = np.empty_like(self.order)
        self.place[self.order] = np.arange(len(plain))
        lists = parts["near"], parts["near_distance"]
        self.tree = kernels.make_tree(plain, actions.numpy(), parts["axes"], parts["order"], *lists)
        self.nowhere = np.zeros((1, plain.shape[1]), np.float32)

    @property
    def nbytes(self) -> int:
        parts = (*self.tree, *self.tree.codes, self.order, self.place)
        arrays = [part for part in parts if isinstance(part, np.ndarray)]
        return sum(array.nbytes for array in arrays)

    def _build(self, states: np.ndarray, path: Path | None) -> dict[str, np.ndarray]:
        """Order of the leaves and lists of near states: some tens of microseconds a row and thread."""
        if path and len(states) >= 100_000:
            print(f"building the index of nearest states of {len(states):,} rows, once", file=sys.stderr, flush=True)
        kernels, n = self.kernels, len(states)
        axes = kernels.principal_axes(states)
        order = kernels.leaf_order(kernels.turn(states, axes)[0]).astype(np.int32)
        near = np.full((n, LIST_LENGTH), -1, np.int32)
        near_distance = np.full((n, LIST_LENGTH), np.inf, np.float32)
        nothing = np.zeros((n, 0), np.float32)  # lists compare states alone
        tree = kernels.make_tree(states, nothing, axes, order, near, near_distance)
        cuts = range(0, n, _CHUNK)
        _spread([(kernels.near_states, tree, low, min(low + _CHUNK, n), near, near_distance) for low in cuts])
        return {"axes": axes, "order": order, "near": near, "near_distance": near_distance}

    def query(
        self, rows: Tensor, actions: Tensor, betas: Tensor, k: int, states: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Neighbors.query`; everything is flat: `[Q]`, `[Q, A]`, `[Q]`."""
        return outside(lambda: self._search(rows, actions, betas, k, states))

    def _search(
        self, rows: Tensor, actions: Tensor, betas: Tensor, k: int, states: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        asked, count = rows.numpy(), len(rows)
        if not 0 <= betas.numpy().min() <= betas.numpy().max() <= _LARGEST_BETA:
            raise OffrlError(f"beta={betas.numpy()[0]:g} should be between 0 and {_LARGEST_BETA:g}; set agent.beta.")
        places = np.where(asked >= 0, self.place[asked], -1)
        # Neighbouring leaves one after the other: what they share is then in the processor's cache.
        tour = np.argsort(places, kind="stable")
        own = self.nowhere if states is None else states.numpy()[tour]
        turned = (own.astype(np.float64) @ self.tree.axes).astype(np.float32)
        places, asked_actions, weights = places[tour], actions.numpy()[tour], betas.numpy()[tour]
        found, distance = np.empty((count, k), np.int64), np.empty((count, k))
        from_list = np.empty(count, np.uint8)
        self.kernels.ask_lists(self.tree, places, asked_actions, weights, found, distance, from_list)
        rest = np.flatnonzero(from_list == 0)
        parts = np.array_split(rest, max(1, min(torch.get_num_threads(), len(rest) // _SHARE)))
        question = (places, own, turned, asked_actions, weights, found, distance)
        _spread([(self.kernels.answer, self.tree, part, *question) for part in parts if len(part)])
        back = np.empty_like(tour)
        back[tour] = np.arange(count)
        nearest = self.order[found[back, k - 1]]
        return (
            torch.from_numpy(nearest),
            torch.from_numpy(distance[back, k - 1]),
            torch.from_numpy(from_list[back].astype(bool)),
        )


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, "offrl-neighbors")


def _spread(calls: list[tuple[Any, ...]]) -> None:
    """Make the calls, side by side when PyTorch may use several threads; compiled code leaves the interpreter free."""
    count = torch.get_num_threads()
    if count == 1 or len(calls) <= 1:
        for function, *arguments in calls:
            function(*arguments)
        return
    pool = _threads(count)
    running: list[Future[None]] = [pool.submit(*call) for call in calls]
    for future in running:
        future.result()


def _path(states: np.ndarray) -> Path:
    digest = hashlib.blake2b(np.ascontiguousarray(states).data.cast("B"), digest_size=16)
    return cache_dir() / "neighbors" / f"{digest.hexdigest()}.safetensors"


def _read(path: Path, rows: int, width: int) -> dict[str, np.ndarray] | None:
    """The kept index; None when there is none, or it is damaged or of another version (then it is built anew)."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return None
    wanted = {
        "axes": (width, width),
        "order": (rows,),
        "near": (rows, LIST_LENGTH),
        "near_distance": (rows, LIST_LENGTH),
    }
    try:
        with safe_open(path, framework="np") as file:
            version, _, checksum = (file.metadata() or {}).get("version", "").partition(" ")
            if version != _VERSION:
                return None
            parts = {name: file.get_tensor(name) for name in wanted}
        if checksum != _checksum(parts):  # the kernels trust its row numbers
            raise ValueError("its content differs from its checksum")
    except (OSError, SafetensorError, ValueError) as error:
        warnings.warn(f"{path} can't be used ({error}); the index is built again.", stacklevel=2)
        return None
    fits = all(parts[name].shape == shape for name, shape in wanted.items())
    return parts if fits and np.array_equal(np.sort(parts["order"]), np.arange(rows)) else None


def _checksum(parts: dict[str, np.ndarray]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, part in sorted(parts.items()):
        digest.update(f"{name} {part.dtype} {part.shape}".encode())
        digest.update(np.ascontiguousarray(part).data.cast("B"))
    return digest.hexdigest()


def _write(path: Path, parts: dict[str, np.ndarray]) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        with replacing(path, own_folder=True) as temporary:
            save_file(parts, temporary, metadata={"version": f"{_VERSION} {_checksum(parts)}"})
    except (OSError, SafetensorError) as error:
        warnings.warn(f"{path} can't be written ({error}); the index is not kept.", stacklevel=2)


# ---- GPU -----------------------------------------------------------------------------------------------------


class Blocks:
    """Exact search by blocked matrix products, with shapes that don't depend on data and no copy to the host.

    |q - x|^2 = |q|^2 - 2 q x + |x|^2 costs one product for all pairs, but in float32 the terms cancel: the value may be off
    by `c u (|q| + |x|)^2` with u = 2^-24 and c a little above the number of dimensions. So each query keeps its m smallest
    values and computes these distances again, by differences in float64. The best of them is the answer for certain when
    the m-th smallest value exceeds it by more than twice that error. The few most doubtful queries then get all their
    distances in float64.

    Args:
        block: rows in a product; bounds the memory of the values, `[Q, block]`.
        candidates: m, beyond k.
        doubtful: queries that float64 looks at again in each call. Outside a captured graph on the processor further
            rounds follow until no doubt is left; on a GPU, where nobody may wait for an answer, what exceeds them shows
            as `from_list` = False. It takes more than m rows within rounding of the nearest to get there.
    """

    def __init__(
        self, states: Tensor, actions: Tensor, block: int = 65_536, candidates: int = 32, doubtful: int = 16
    ) -> None:
        self.states, self.actions = states, actions
        self.block, self.candidates, self.doubtful = block, candidates, doubtful
        self.centre = states.double().mean(0)
        centred = (states.double() - self.centre).float()
        # A query (-2 beta^2 s, -2 a, beta^2, 1) times a row (s, a, |s|^2, |a|^2) is the distance but for |q|^2.
        self.table = torch.cat([centred, actions, _square(centred), _square(actions)], 1)
        self.longest = _square(centred).max().double().sqrt(), _square(actions).max().double().sqrt()

    def query(
        self, rows: Tensor, actions: Tensor, betas: Tensor, k: int, states: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Neighbors.query`; everything is flat: `[Q]`, `[Q, A]`, `[Q]`."""
        own = self.states[rows.clamp(min=0)]
        if states is not None:
            own = torch.where((rows >= 0).unsqueeze(1), own, states)
        found, distance, doubt = self._pass(own, actions, betas, k, torch.float32)
        waits = rows.device.type == "cpu"
        for _ in range(-(-len(rows) // self.doubtful) if waits else 1):
            if waits and not bool((doubt > 0).any()):
                break
            worst = doubt.topk(min(self.doubtful, len(rows))).indices
            row, apart, _ = self._pass(own[worst], actions[worst], betas[worst], k, torch.float64)
            found, distance = found.index_copy(0, worst, row), distance.index_copy(0, worst, apart)
            doubt = doubt.index_fill(0, worst, -torch.inf)
        return found, distance, doubt <= 0

    def _block(self, first: int, dtype: torch.dtype) -> Tensor:
        rows = slice(first, first + self.block)
        if dtype == torch.float32:
            return self.table[rows]
        states, actions = self.states[rows].double() - self.centre, self.actions[rows].double()
        return torch.cat([states, actions, _square(states), _square(actions)], 1)

    def _pass(
        self, states: Tensor, actions: Tensor, betas: Tensor, k: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """k-th nearest rows, distances, and by how much rounding exceeds what would certify them (`[Q]` each)."""
        weight = betas.square()
        centred = states.double() - self.centre
        parts = [-2 * weight.unsqueeze(1) * centred, -2 * actions.double(), weight.unsqueeze(1)]
        query = torch.cat([*parts, torch.ones_like(parts[-1])], 1).to(dtype)
        kept = min(self.candidates + k, len(self.table))
        values = query.new_empty(len(query), 0)
        rows = torch.empty(len(query), 0, dtype=torch.int64, device=query.device)
        for first in range(0, len(self.table), self.block):
            block = self._block(first, dtype)
            value, row = (query @ block.T).topk(min(kept, len(block)), largest=False)
            values, rows = torch.cat([values, value], 1), torch.cat([rows, row + first], 1)
            values, pick = values.topk(min(kept, values.shape[1]), largest=False)
            rows = rows.gather(1, pick)
        exact = weight.unsqueeze(1) * (self.states[rows].double() - states.double().unsqueeze(1)).square().sum(-1)
        exact = exact + (self.actions[rows].double() - actions.double().unsqueeze(1)).square().sum(-1)
        exact, pick = exact.sort(dim=1, stable=True)
        length = betas * (centred.norm(dim=1) + self.longest[0]) + actions.double().norm(dim=1) + self.longest[1]
        coarse = states.is_cuda and torch.backends.cuda.matmul.allow_tf32
        unit = 2.0**-10 if coarse else torch.finfo(torch.float32).eps
        error = (self.table.shape[1] + 4) * unit * length.square()
        constant = weight * centred.square().sum(1) + actions.double().square().sum(1)
        beyond = values.amax(1).double() + constant - 2 * error
        doubt = exact[:, k - 1] - beyond if kept < len(self.table) else torch.full_like(beyond, -torch.inf)
        return rows.gather(1, pick[:, k - 1 : k]).squeeze(1), exact[:, k - 1].sqrt(), doubt


def _square(rows: Tensor) -> Tensor:
    """`[n, 1]` squared lengths."""
    return rows.square().sum(-1, keepdim=True)
