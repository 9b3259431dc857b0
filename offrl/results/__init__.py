"""Rows of results, and what is made of them."""

from offrl.results.rows import *  # noqa: F403
