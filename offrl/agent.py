"""The public home of the base classes, for agents outside this package; `offrl.agents` is where they live."""

from offrl.agents.base import Agent, Batch, Spec, WindowBatch
from offrl.agents.recurrent import ActingState, RecurrentAgent

RememberingAgent = RecurrentAgent  # its name in version 0.1

__all__ = ["ActingState", "Agent", "Batch", "RecurrentAgent", "RememberingAgent", "Spec", "WindowBatch"]
