"""Engines: what computes the operators, one file each, chosen per call in the order in which they are listed here.

A new engine is a file with a class like those below and its place in the list. Engines of other packages register
themselves with `register`.
"""

from .call import Call
from .engine import FOLDERS, Engine, GateCall, implementation
from .flash_attention import FlashAttentionEngine
from .gluon import GluonEngine
from .registry import choose, engines, find, register, serve, unregister, use_engine
from .torch import TorchEngine
from .triton import TritonEngine

for _engine in (GluonEngine(), TritonEngine(), FlashAttentionEngine(), TorchEngine()):  # in order of priority
    register(_engine)

__all__ = [
    "FOLDERS",
    "Call",
    "Engine",
    "GateCall",
    "choose",
    "engines",
    "find",
    "implementation",
    "register",
    "serve",
    "unregister",
    "use_engine",
]
