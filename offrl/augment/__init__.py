"""Augmentation: synthetic trajectories that any agent's batches are mixed with, made anew as the policy changes."""
