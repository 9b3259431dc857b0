"""Datasets that are built on the spot."""
