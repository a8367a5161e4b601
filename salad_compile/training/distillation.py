"""Layer-wise warm-up: each site learns the output of dense attention, from the base model's own activations.

One forward serves all sites. Every site runs twice on the same input: as SALAD, with a gradient, and dense without its
low-rank update, which is what the base model computes. The dense output is passed to the next layer, so that no site
sees another's error. The gradient of a site is taken at once: only one site's graph is in memory at any time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from salad_compile.sites.branch import SaladBranch, branches
from salad_compile.training.reference_states import as_base


class SiteDistillation:
    """While :meth:`watching`, forwards of a converted model accumulate the gradients of every site's own error.

    The error of a site is the mean squared difference over the mean square of the dense output, so that layers whose
    values are large do not outweigh the others (our choice). It is computed for each sample, over all tokens.

    Args:
        model: converted, not compiled, not sharded, without activation checkpointing.
        scale: factor of the gradients; 1 / (micro-batches of a step), say.

    Attributes:
        errors: of the last forward, one tensor (B,) for each site.
    """

    def __init__(self, model: nn.Module, scale: float) -> None:
        self.scale = scale
        self.errors: list[Tensor] = []
        self.sites = [(model.get_submodule(b.record.owner), b) for b in branches(model).values()]

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks on every owner; the forward within is to be called with gradients enabled."""
        handles = [
            owner.register_forward_hook(self._hook(branch), with_kwargs=True, prepend=True)
            for owner, branch in self.sites
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def losses(self) -> Tensor:
        """The mean over the sites for each sample of the last forward, (B,)."""
        return torch.stack(self.errors).mean(0)

    def _hook(self, branch: SaladBranch) -> Any:
        def compare(owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            with torch.no_grad(), as_base([branch]):
                dense = owner.forward(*args, **kwargs)
            pairs = list(zip(_tensors(output), _tensors(dense), strict=True))
            error = sum(((_relative_error(ours, theirs)) for ours, theirs in pairs), torch.zeros(())) / len(pairs)
            (error.mean() * self.scale / len(self.sites)).backward()  # type: ignore[no-untyped-call]
            self.errors.append(error.detach())
            return dense

        return compare


def _tensors(output: Any) -> list[Tensor]:
    """The tensors that an owner returned: one, or several for joint streams."""
    found = [output] if isinstance(output, Tensor) else list(output)
    return [tensor for tensor in found if isinstance(tensor, Tensor)]


def _relative_error(ours: Tensor, dense: Tensor) -> Tensor:
    """(B,), in fp32."""
    difference = (ours.float() - dense.float()).square().flatten(1).mean(1)
    return difference / dense.float().square().flatten(1).mean(1)
