"""Scoring policies: in environments, and without them."""
