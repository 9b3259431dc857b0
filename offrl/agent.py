"""Where agents outside this package have always found their base; it lives in `offrl.agents.base`."""

from offrl.agents.base import Agent, Batch, RememberingAgent, Spec

__all__ = ["Agent", "Batch", "RememberingAgent", "Spec"]
