"""What our evaluator asks of a policy besides `select_action`, for policies of others."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class PeerPolicy(nn.Module):
    """A policy without a state; a subclass sets `spec` and has `select_action(obs, state)`."""

    def initial_state(self, envs: int) -> None:
        return None

    def predicted_return(self, obs: Tensor, state: Any) -> None:
        return None

    def update_state(self, state: Any, action: Tensor, reward: Tensor) -> None:
        return None
