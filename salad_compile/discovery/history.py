"""Autograd's record of a forward under discovery, where the model switched it off or does what it refuses."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# Private. Seen in torch 2.11 and 2.13; tests/salad_compile/discovery/test_discover.py fails when it moves.
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten


@contextlib.contextmanager
def history() -> Iterator[None]:
    """Autograd records what runs here, wherever the model itself switched it off."""
    if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.enable_grad():
        yield


def ordinary(tree: Any) -> Any:
    """Copies of tensors that were made in inference mode, which autograd refuses."""
    leaves, spec = tree_flatten(tree)
    if not any(isinstance(leaf, Tensor) and leaf.is_inference() for leaf in leaves):
        return tree
    copies = (leaf.clone() if isinstance(leaf, Tensor) and leaf.is_inference() else leaf for leaf in leaves)
    return tree_unflatten(copies, spec)


def write_into_memory(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run an operation that writes into its arguments, of which autograd hears nothing. Returns what it returns."""
    leaves = tree_flatten((args, kwargs))[0]
    plain = {id(leaf): leaf.data for leaf in leaves if isinstance(leaf, Tensor)}
    back = {id(plain[id(leaf)]): leaf for leaf in leaves if isinstance(leaf, Tensor)}
    plain_args, plain_kwargs = tree_map(lambda leaf: plain.get(id(leaf), leaf), (args, kwargs))
    with torch.no_grad():
        return tree_map(lambda leaf: back.get(id(leaf), leaf), func(*plain_args, **plain_kwargs))
