"""Policies for tests that only care how many blocks are recomputed together."""

from deepscale.activations import KeepAll, Policy, Recompute


def in_segments(segment: int) -> Policy:
    """Segments of so many blocks are recomputed; 0 keeps all."""
    return Recompute(segment) if segment else KeepAll()
