"""The public home of the base classes, for agents outside this package; they live in `offrl.agents.base`."""

from offrl.agents.base import ActingState, Agent, Batch, RecurrentAgent, Spec, WindowBatch

RememberingAgent = RecurrentAgent  # its name in version 0.1

__all__ = ["ActingState", "Agent", "Batch", "RecurrentAgent", "RememberingAgent", "Spec", "WindowBatch"]
