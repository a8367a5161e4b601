"""Layer-wise warm-up: each site learns the output of dense attention, from the base model's own activations.

One forward serves all sites. It is the base model's: dense, without low-rank updates, also of projections that lie
outside of their site, and without a graph. Every site then runs once more on the same input, as SALAD and with a
gradient, so that no site sees another's error. The gradient of a site is taken at once: only one site's graph is in
memory at any time.

Under FSDP2 that is also when the parameters of a site are whole. Its own machinery reduces gradients in a backward pass
through the outputs of its modules, which never comes here, so gradients are kept by name until the step ends.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from salad_compile.common.sharding import sharded_around
from salad_compile.common.wrappers import plain_key
from salad_compile.sites.branch import SaladBranch, branches
from salad_compile.sites.site import hold_dense
from salad_compile.training.reference_states import as_base


class SiteDistillation:
    """While :meth:`watching`, forwards of a converted model sum up the gradients of every site's own error.

    The error of a site is the mean squared difference over the mean square of the dense output, so that layers whose
    values are large do not outweigh the others (our choice). It is computed for each sample, over all tokens.

    Args:
        model: converted, running uncompiled, without activation checkpointing; sharded by FSDP2 or not.
        scale: factor of the gradients; 1 / (micro-batches of a step), say.

    Attributes:
        errors: of the last forward, one tensor (B,) for each site.
        gradients: plain name -> sum over the forwards so far, of this process alone and not sharded.
    """

    def __init__(self, model: nn.Module, scale: float) -> None:
        self.model, self.scale = model, scale
        self.errors: list[Tensor] = []
        self.gradients: dict[str, Tensor] = {}
        self.sites = [(name, model.get_submodule(b.record.owner), b) for name, b in branches(model).items()]

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks on every owner; the forward within computes what the base model does, and no gradients."""
        scales = [branch.low_rank_scale.clone() for _, _, branch in self.sites]
        handles = [
            owner.register_forward_hook(self._hook(name, branch, scale), with_kwargs=True, prepend=True)
            for (name, owner, branch), scale in zip(self.sites, scales, strict=True)
        ]
        try:
            with torch.no_grad(), as_base(branch for _, _, branch in self.sites):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def losses(self) -> Tensor:
        """The mean over the sites for each sample of the last forward, (B,)."""
        return torch.stack(self.errors).mean(0)

    def take_gradients(self) -> dict[str, Tensor]:
        """The gradients; afterwards there are none."""
        gradients, self.gradients = self.gradients, {}
        return gradients

    def _hook(self, name: str, branch: SaladBranch, scale: Tensor) -> Any:
        around = sharded_around(self.model, branch.record.owner)

        def compare(owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dense: Any) -> None:
            with _as_trained(branch, scale), torch.enable_grad():
                output = owner.forward(*args, **kwargs)
                pairs = list(zip(_tensors(output), _tensors(dense), strict=True))
                error = sum(((_relative_error(ours, theirs)) for ours, theirs in pairs), torch.zeros(())) / len(pairs)
                self._add_gradients(name, branch, error.mean() * self.scale / len(self.sites), around)
            self.errors.append(error.detach())

        return compare

    def _add_gradients(self, name: str, branch: SaladBranch, loss: Tensor, around: list[Any]) -> None:
        # looked up now: under FSDP2 these are the whole ones, which exist during the forward alone
        parameters = {key: p for key, p in branch.named_parameters() if p.requires_grad}
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        # a module within the site that is sharded by itself ends a backward pass by sharding everything
        for module in around:
            module.unshard()
        for key, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                plain = plain_key(f"{name}.{key}")
                known = self.gradients.get(plain)
                self.gradients[plain] = gradient if known is None else known + gradient


@contextlib.contextmanager
def _as_trained(branch: SaladBranch, scale: Tensor) -> Iterator[None]:
    """One site of a base model as it is trained: sparse, with its low-rank update at `scale`."""
    branch.low_rank_scale.copy_(scale)
    try:
        with hold_dense([branch], False):
            yield
    finally:
        branch.low_rank_scale.zero_()


def _tensors(output: Any) -> list[Tensor]:
    """The tensors that an owner returned: one, or several for joint streams."""
    found = [output] if isinstance(output, Tensor) else list(output)
    return [tensor for tensor in found if isinstance(tensor, Tensor)]


def _relative_error(ours: Tensor, dense: Tensor) -> Tensor:
    """(B,), in fp32."""
    difference = (ours.float() - dense.float()).square().flatten(1).mean(1)
    return difference / dense.float().square().flatten(1).mean(1)
