"""offrl: an offline reinforcement learning zoo."""

__version__ = "0.1.0"
