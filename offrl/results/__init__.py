"""Rows of results: written by a run, read by everything else."""

from offrl.results.online import OnlineRows
from offrl.results.rows import (
    EPISODE_COLUMNS,
    METRIC_COLUMNS,
    Progress,
    Run,
    has_critic,
    progress,
    read,
    read_metrics,
    runs,
)
from offrl.results.writer import RunWriter

__all__ = [
    "EPISODE_COLUMNS",
    "METRIC_COLUMNS",
    "OnlineRows",
    "Progress",
    "Run",
    "RunWriter",
    "has_critic",
    "progress",
    "read",
    "read_metrics",
    "runs",
]
