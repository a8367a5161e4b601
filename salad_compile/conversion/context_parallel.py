"""parallelise(model): converted sites of a model whose tokens are split over processes attend to all of them.

diffusers' own engine (`enable_parallelism`) splits tokens at module boundaries and gathers them in the end, and that
stays. What it does around attention happens inside an autograd function of its own, where SALAD would find all tokens
of some heads, a gate for a part of the tokens, and no gradients. So converted sites get plain attention calls back, and
the definition itself exchanges heads and tokens (definition/attention.py, kernels/exchange). Attention that
the conversion left dense keeps diffusers' exchange.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch.nn as nn

from salad_compile.common.wrappers import single_model
from salad_compile.definition import patterns
from salad_compile.errors import ConfigError, require_conversion
from salad_compile.kernels.exchange import group_name
from salad_compile.sites.branch import SaladBranch, branches

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Model = TypeVar("Model", bound=nn.Module)

# Private names of diffusers 0.42.1 (tests/salad_compile/conversion/test_context_parallel.py): the attribute of models
# and attention processors that `enable_parallelism` sets, and the field of ContextParallelConfig with the mesh of the
# processes that exchange heads.
_SETTINGS = "_parallel_config"
_MESH = "_ulysses_mesh"


def parallelise(model: Model) -> Model:
    """Let SALAD run across processes after `model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=P))`.

    For sequences that outgrow one device. Each process has S / P tokens of everything, and within attention all S
    tokens of H / P heads; where P does not divide H, two processes share a head, each with a part of its queries. Call
    it in each process, after conversion and before compilation. In training each process has the gradients of its
    tokens: sum them over the group.

    Args:
        model: a converted model of diffusers.

    Returns:
        `model`.

    Raises:
        NotConvertedError: nothing is converted.
        ConfigError: diffusers' context parallelism is off or works in another way than by exchanging heads, or a site
            cannot be exchanged: text in the sequence, attention masks, dense attention just now whose heads P does not
            divide, or a processor shared with attention that is not converted. Nothing is changed.
    """
    bare = single_model(model, "parallelise")
    known = branches(bare)
    require_conversion(bool(known), type(bare).__name__)
    group = _group_of(bare)
    for branch in known.values():
        if fault := _fault(branch, group.size()):
            raise ConfigError(f"{branch.record.owner!r} cannot run across processes: {fault}.")
    owners = {bare.get_submodule(branch.record.owner): branch for branch in known.values()}
    processors = _processors(bare, owners)
    for branch in owners.values():
        branch.share_tokens(group_name(group, branch.record.heads))
    # dense for a while (set_dense, DenseSteps) is diffusers' business again
    exchanges = [(processor, _SETTINGS, getattr(processor, _SETTINGS)) for processor in processors]
    for switch in {branch.switch for branch in owners.values()}:
        switch.exchanges = exchanges
        switch.turn(switch.dense)
    return model


def _group_of(model: nn.Module) -> ProcessGroup:
    """The processes among which diffusers splits the tokens of a model."""
    settings = getattr(getattr(model, _SETTINGS, None), "context_parallel_config", None)
    if settings is None:
        raise ConfigError(
            f"context parallelism is off in this {type(model).__name__}: call model.enable_parallelism(config="
            "diffusers.ContextParallelConfig(ulysses_degree=...)) first, which splits its tokens."
        )
    if settings.ring_degree != 1 or settings.ulysses_anything:
        raise ConfigError(
            "SALAD runs across processes by exchanging heads for tokens, in equal parts: ContextParallelConfig("
            f"ulysses_degree=...) without ring attention and ulysses_anything, got {settings.ring_degree=}, "
            f"{settings.ulysses_anything=}."
        )
    group: ProcessGroup = getattr(settings, _MESH).get_group()
    return group


def _fault(branch: SaladBranch, processes: int) -> str:
    """Why a site's heads and tokens cannot be exchanged, or the empty string."""
    spec = branch.decoded_spec()
    if spec.text != "none":
        return "it attends to text and video at once"
    if not patterns.find(spec.pattern).crosses_processes:
        able = [name for name in patterns.names() if patterns.find(name).crosses_processes]
        return f"the pattern is {spec.pattern!r}, and only {', '.join(map(repr, able))} can"
    if spec.square_mask:
        return "it has an attention mask"
    if branch.switch.dense and branch.record.heads % processes:
        return (
            f"its {branch.record.heads} heads do not divide by {processes} processes, and its attention is dense just "
            "now (set_dense, DenseSteps), which diffusers exchanges in whole heads"
        )
    return ""


def _processors(model: nn.Module, owners: Mapping[nn.Module, SaladBranch]) -> list[Any]:
    """The attention processors of converted sites.

    Raises:
        ConfigError: other attention has the same, or there is none that diffusers told to exchange heads.
    """
    found: dict[int, Any] = {}
    for owner, branch in owners.items():
        processor = getattr(owner, "processor", None)
        if getattr(processor, _SETTINGS, None) is None:
            raise ConfigError(f"{branch.record.owner!r} has no attention processor that diffusers has parallelised.")
        found[id(processor)] = processor
    for name, module in model.named_modules():
        if module not in owners and id(getattr(module, "processor", None)) in found:
            raise ConfigError(f"{name!r} is not converted and shares its attention processor with a converted site.")
    return list(found.values())
