"""What datasets may tell of themselves: `offrl_info`, Minari's `metadata.json` and its spaces, as pydantic models.

Whatever does not fit (a bound in words, NaN, a limit of 0, an id that is a number) becomes one sentence. Nothing that is
named here is imported or opened.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from offrl.data.actions import bounds
from offrl.data.dataset import DatasetInfo
from offrl.utils.errors import OffrlError, one_line

MARKUP = re.compile(r"\[/?[a-z#@][^\[\]]*\]")  # of rich, which prints names


def _plain(text: str) -> str:
    if not text.isprintable() or not text.strip() or MARKUP.search(text):
        raise ValueError("must be plain text on one line")
    return text


def _sizes(value: Any) -> list[int]:
    sizes = np.asarray(value)
    if sizes.dtype.kind not in "iu" or sizes.size == 0 or sizes.min() < 1:
        raise ValueError("must be positive integers")
    return [int(size) for size in sizes.reshape(-1)]


def _starts(value: Any) -> list[int]:
    starts = np.asarray(value)
    if starts.dtype.kind not in "iu":
        raise ValueError("must be integers")
    return [int(start) for start in starts.reshape(-1)]


def _limit(value: Any) -> Any:
    numbers = value if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x) for x in numbers):
        raise ValueError("must be finite numbers, one or one a dimension")
    return value


def _dtype(text: str) -> str:
    try:
        return np.dtype(text).name
    except TypeError as error:
        raise ValueError("must be a dtype of numpy") from error


Name = Annotated[str, Field(max_length=300), AfterValidator(_plain)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=2**53)]
Limit = Annotated[Any, AfterValidator(_limit)]
Sizes = Annotated[Any, AfterValidator(_sizes)]


class Strict(BaseModel):
    """No conversion between types: a number in quotes is no number, and true is not 1."""

    model_config = ConfigDict(strict=True, extra="ignore")


class Info(Strict):
    """Fields of DatasetInfo as files carry them."""

    model_config = ConfigDict(strict=True, extra="forbid")

    id: Name = "arrays"
    source: str = "arrays"
    env_id: Name | None = None
    env_kwargs: dict[str, Any] = {}
    family: Name = "unknown"
    ref_min: Finite | None = None
    ref_max: Finite | None = None
    max_episode_steps: Count | None = None
    action_low: Limit = -1.0
    action_high: Limit = 1.0
    discrete: Count | None = None
    provenance: dict[str, Any] = {}


# ---- spaces ------------------------------------------------------------------------------------------------------


class Box(Strict):
    """A box of numbers; bounds are arrays of its shape or single numbers."""

    type: Literal["Box"]
    dtype: Annotated[str, AfterValidator(_dtype)] = "float32"
    shape: list[Annotated[int, Field(ge=0)]]
    low: Any = None
    high: Any = None


class Discrete(Strict):
    """The integers `start` to `start + n - 1`."""

    type: Literal["Discrete"]
    n: Count
    start: int = 0


class MultiDiscrete(Strict):
    """Several discrete numbers, `nvec` counts the values of each."""

    type: Literal["MultiDiscrete"]
    nvec: Sizes
    start: Annotated[Any, AfterValidator(_starts)] = [0]

    @model_validator(mode="after")
    def _check_start(self) -> MultiDiscrete:
        if len(self.start) not in (1, len(self.nvec)):
            raise ValueError(f"has {len(self.start)} starts for {len(self.nvec)} numbers")
        return self


class MultiBinary(Strict):
    """An array of zeros and ones."""

    type: Literal["MultiBinary"]
    n: Sizes


class Dict(Strict):
    """Spaces by name."""

    type: Literal["Dict"]
    subspaces: dict[str, Space]


class Tuple(Strict):
    """Spaces by number."""

    type: Literal["Tuple"]
    subspaces: list[Space]


class Text(Strict):
    """Words."""

    type: Literal["Text"]


class Other(Strict):
    """A space that holds no arrays of one size."""

    type: str


KINDS = ("Box", "Discrete", "MultiDiscrete", "MultiBinary", "Dict", "Tuple", "Text")


def _kind(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return kind if kind in KINDS else "Other"


Space = Annotated[
    Annotated[Box, Tag("Box")]
    | Annotated[Discrete, Tag("Discrete")]
    | Annotated[MultiDiscrete, Tag("MultiDiscrete")]
    | Annotated[MultiBinary, Tag("MultiBinary")]
    | Annotated[Dict, Tag("Dict")]
    | Annotated[Tuple, Tag("Tuple")]
    | Annotated[Text, Tag("Text")]
    | Annotated[Other, Tag("Other")],
    Discriminator(_kind),
]


class Holder(Strict):
    """Any one space."""

    space: Space


for _model in (Dict, Tuple):
    _model.model_rebuild()


# ---- Minari --------------------------------------------------------------------------------------------------------


class EnvSpec(Strict):
    """The parts of a Gymnasium spec that are used; its `entry_point` only in a message, nothing imports it."""

    id: Name | None = None
    entry_point: Any = None
    max_episode_steps: Count | None = None
    kwargs: dict[str, Any] | None = None


class MinariMetadata(Strict):
    """The parts of `metadata.json` that are used."""

    total_steps: int  # held against the data file's size when that is opened
    observation_space: Space
    action_space: Space
    env_spec: EnvSpec | None = None
    eval_env_spec: EnvSpec | None = None
    dataset_id: Name | None = None
    ref_min_score: Finite | None = None
    ref_max_score: Finite | None = None
    data_format: str = "hdf5"
    jpeg_encoding: bool = True
    offrl_info: Any = None
    algorithm_name: Any = None
    author: Any = None
    code_permalink: Any = None
    minari_version: Any = None
    requirements: Any = None


# ---- parsing -------------------------------------------------------------------------------------------------------

Model = TypeVar("Model", bound=BaseModel)


def from_json(text: Any, where: str) -> Any:
    """The value of a JSON text; other values stay."""
    if not isinstance(text, (str, bytes)):
        return text
    try:
        return json.loads(text)  # JSON within a file that was read within bounds; `parse` checks what it holds
    except (ValueError, RecursionError) as error:
        raise OffrlError(f"{where} is not valid JSON ({one_line(error)}); write or fetch the dataset again.") from error


def parse(model: type[Model], values: Any, where: str) -> Model:
    """`values` as a model.

    Raises:
        OffrlError: the first thing that does not fit, in one sentence.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part not in (*KINDS, "Other"))
        reason = one_line(first["msg"].removeprefix("Value error, "))
        got = one_line(repr(first["input"]), 60)
        raise OffrlError(f"{where}: {place or 'it'} is {got} ({reason}); write or fetch the dataset again.") from error
    except RecursionError as error:
        raise OffrlError(f"{where} is nested too deeply; write or fetch the dataset again.") from error


def own_info(written: Any, base: DatasetInfo, where: str) -> DatasetInfo:
    """`base` with what a dataset's own `offrl_info` tells: JSON of DatasetInfo's fields, or the fields themselves.

    Raises:
        OffrlError: fields that DatasetInfo does not have, or values that they cannot have.
    """
    values = from_json(written, f"{where}: offrl_info")
    if not isinstance(values, dict):
        raise OffrlError(f"{where}: offrl_info is no JSON object; write the dataset again.")
    if unknown := sorted(map(str, set(values) - set(Info.model_fields))):
        raise OffrlError(f"{where}: offrl_info holds unknown fields {one_line(unknown)}; another version wrote it.")
    fields = parse(Info, values, f"{where}: offrl_info").model_dump(include=set(values))
    info = replace(base, **fields)
    if info.ref_min is not None and info.ref_max is not None and not info.ref_min < info.ref_max:
        raise OffrlError(f"{where}: offrl_info: ref_min={info.ref_min} should be below ref_max={info.ref_max}.")
    if {"action_low", "action_high"} & set(fields):
        info = replace(info, **bounds(info.action_low, info.action_high, f"{where}: offrl_info"))
    # Notices are of the file that was read when this one was written.
    return replace(info, provenance={key: value for key, value in info.provenance.items() if key != "notices"})


def minari_metadata(values: Any, where: str) -> MinariMetadata:
    """Minari's metadata, whose spaces and specs are JSON within JSON.

    Raises:
        OffrlError: what does not fit.
    """
    if not isinstance(values, dict):
        raise OffrlError(f"{where}: metadata.json is no JSON object; fetch the dataset again.")
    inner = ("observation_space", "action_space", "env_spec", "eval_env_spec")
    read = {key: from_json(values[key], f"{where}: {key} in metadata.json") for key in inner if values.get(key)}
    return parse(MinariMetadata, {**values, **read}, f"{where}: metadata.json is not what Minari writes")
