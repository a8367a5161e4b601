"""Random numbers as a function of their purpose: no generator has a state that a checkpoint would have to hold.

A seed is derived from the run's seed, the step and the sample's place in the global batch. So a resumed run, and
a run on another number of processes, draw the same noise for the same sample.
"""

from __future__ import annotations

import hashlib

import torch


def derive_seed(*parts: int | str) -> int:
    """A seed below 2 ** 63 for these parts, the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A generator on the CPU, because other devices draw other numbers from one seed."""
    return torch.Generator().manual_seed(derive_seed(*parts))
