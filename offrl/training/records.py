"""What stands in a checkpoint's header, as schemas: such files come from anywhere."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import Field, FiniteFloat, ValidationInfo, field_validator

from offrl.data.dataset import DatasetInfo
from offrl.nets.spec import Bound, check_bounds
from offrl.results.records import Count, FailureRecord, ManifestRecord, Record, ResultRecord, score_name

__all__ = ["FailureRecord", "ManifestRecord", "OnlineRecord", "ResultRecord", "RunRecord", "SpecRecord", "score_name"]

Size = Annotated[int, Field(ge=1, lt=2**31)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]


class SpecRecord(Record):
    """What an agent was built from, without the statistics, which are tensors of the agent."""

    obs_dim: Size
    action_dim: Size
    seeds: Annotated[list[Seed], Field(min_length=1)]
    discrete: bool = False
    action_low: FiniteFloat | tuple[FiniteFloat, ...] = -1.0
    action_high: FiniteFloat | tuple[FiniteFloat, ...] = 1.0

    @field_validator("action_low", "action_high")
    @classmethod
    def _is_a_box(cls, bound: Bound, info: ValidationInfo) -> Bound:
        """Bounds that fit `action_dim`, the lower below the upper; those above in this record, if they are right, are known."""
        known = {"action_low": -math.inf, "action_high": math.inf} | info.data | {str(info.field_name): bound}
        if "action_dim" in known and not known.get("discrete"):
            check_bounds(known["action_low"], known["action_high"], known["action_dim"])
        return bound


class OnlineRecord(Record):
    """Where an online phase stands."""

    step: Count  # environment steps of every lane
    episodes: list[Count]  # number of each lane's episode under way
    lengths: list[Count]  # steps of it so far
    metrics: dict[str, list[float]] = Field(default_factory=dict)  # the latest of each name


class RunRecord(Record):
    """The facts of a run's checkpoint."""

    step: Count
    fingerprint: Annotated[str, Field(min_length=1, max_length=200)]
    config: dict[str, Any]
    spec: SpecRecord
    info: DatasetInfo
    online: OnlineRecord | None = None
    unplayed: bool = False  # whether the evaluation of `step` was still under way beside training

    @field_validator("config")
    @classmethod
    def _has_an_agent(cls, config: dict[str, Any]) -> dict[str, Any]:
        agent = config.get("agent")
        if not isinstance(agent, dict) or not isinstance(agent.get("_target_"), str):
            raise ValueError("should hold an agent with its _target_")
        return config
