"""Which parts of a Dict observation an agent sees, and in which order; readers and evaluation share this one rule."""

from __future__ import annotations
