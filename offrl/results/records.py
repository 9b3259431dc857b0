"""What stands in the JSON of a run's folder, as schemas: such files come from anywhere. They need no PyTorch."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=0, lt=2**63)]


class Record(BaseModel):
    """Further keys, of later versions, are no error."""

    model_config = ConfigDict(strict=True, extra="ignore")


class ResultRecord(Record):
    """`result.json`."""

    step: Count  # updates made
    returns: list[float | None]  # mean return of each lane; empty when nothing was evaluated
    scores: list[float | None] | None = None  # the same as normalised scores
    success: bool = False  # whether these are success rates in percent


class ManifestRecord(Record):
    """What is read again of `manifest.json`."""

    files: dict[str, str] = Field(default_factory=dict)  # where each dataset lay
    engine: str = ""


def score_name(success: bool) -> str:
    """What a run's scores are called where they are shown."""
    return "success rate (%)" if success else "normalised score"


class FailureRecord(Record):
    """`failed.json`: why the last try of a sweep's job failed."""

    message: Annotated[str, Field(max_length=10_000)]
