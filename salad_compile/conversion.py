"""convert(model): hang a SALAD branch on every eligible attention module; validates all before it changes anything."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.nn as nn

from .branch import BRANCH_NAME, SaladBranch, SiteRecord, branches
from .config import SaladConfig
from .discovery import AttentionSite, discover
from .errors import (
    AlreadyConvertedError,
    ConfigError,
    NoAttentionError,
    NoEligibleSiteError,
    UnknownProjectionError,
)
from .logs import logger
from .model_tree import components
from .probe import is_linear
from .report import Plan
from .tag import leave_dense

ModelOrPipeline = TypeVar("ModelOrPipeline")


def plan(model: Any, example_inputs: Any = None, *, config: SaladConfig | None = None) -> Plan:
    """What :func:`convert` would do, without touching the model.

    Args:
        model: a module or a diffusers pipeline; weights may be on the meta device.
        example_inputs: tuple of positional inputs or dict of keyword inputs of the model's forward. Without them they
            are synthesised for diffusers-style models, at 480p with 81 frames.
        config: its `min_tokens` decides which sites are eligible.

    Raises:
        InputsError, ProbeError: see :func:`salad_compile.discovery.discover`.
    """
    config = _checked_config(config)
    sites = {
        name: discover(module, example_inputs, min_tokens=config.min_tokens)
        for name, module in components(model).items()
    }
    return Plan(sites=sites, config=config)


def convert(
    model: ModelOrPipeline, config: SaladConfig | Mapping[str, Any] | None = None, *, example_inputs: Any = None
) -> ModelOrPipeline:
    """Attach a SALAD branch (gate, projection, LoRA) to every eligible self-attention site, and return the model.

    Base parameters are frozen (unless `config.train_base`), branch parameters are trainable. State-dict keys of the
    base model do not change. A second call with the same configuration changes nothing, except that it makes branch
    parameters trainable again that another library froze.

    Args:
        model: a module, or a diffusers pipeline, whose `transformer` (and `transformer_2`) is converted.
        config: a :class:`SaladConfig` or a dictionary of its fields; None means the defaults.
        example_inputs: see :func:`plan`.

    Raises:
        ConfigError: a wrong configuration. AlreadyConvertedError: converted before with another one.
        WrappedModelError: compiled or distributed before conversion.
        NoAttentionError: the forward calls no attention. NoEligibleSiteError: none that can be converted.
        InputsError, ProbeError: see :func:`salad_compile.discovery.discover`.
        Whatever is raised, the model is unchanged.
    """
    config = _checked_config(config)
    prepared = []
    for name, module in components(model).items():
        known = branches(module)
        if known:
            _require_same_config(known, config, name)
            for branch in known.values():
                branch.requires_grad_(True)
            logger.info("%s is converted already: %d sites", name or type(module).__name__, len(known))
            continue
        sites = discover(module, example_inputs, min_tokens=config.min_tokens)
        _require_eligible(module, sites, config)
        records = [site.record() for site in sites if site.eligible]
        dense = [s.query[0] for s in sites if s.kind == "self" and not s.eligible and len(s.query) == 1]
        prepared.append((module, prepare(module, records, config), dense))
    for module, attachments, dense in prepared:
        attach(module, attachments, config, dense)
    return model


def prepare(model: nn.Module, records: Iterable[SiteRecord], config: SaladConfig) -> list[SaladBranch]:
    """Build the branches of `records` without touching the model.

    Raises:
        UnknownProjectionError: a module that a record names is missing or is no projection of the recorded widths.
    """
    return [build_branch(model, record, config) for record in records]


def attach(model: nn.Module, prepared: Sequence[SaladBranch], config: SaladConfig, dense: Iterable[str] = ()) -> None:
    """Hang prepared branches on the model, and freeze its base.

    Args:
        dense: query projections of self-attention that stays dense; the backend must not take it for unconverted.
    """
    if not config.train_base:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
    for branch in prepared:
        owner = model.get_submodule(branch.record.owner)
        projections = branch.record.projections()
        modules = {role: model.get_submodule(projections[role]) for role in branch.record.shared_roles()}
        branch.train(owner.training)
        branch.attach(owner, modules)
    for name in dense:
        model.get_submodule(name).register_forward_hook(leave_dense)
    logger.info("converted %d sites of %s at sparsity %s", len(prepared), type(model).__name__, config.sparsity)


def dense_projections(model: nn.Module) -> list[str]:
    """The query projections of self-attention that the conversion left dense."""
    return [name for name, module in model.named_modules() if leave_dense in module._forward_hooks.values()]


def build_branch(model: nn.Module, record: SiteRecord, config: SaladConfig) -> SaladBranch:
    """The branch of one site, on the device and in the dtype of its projections; the model is not touched."""
    projections = {role: _projection(model, name, record) for role, name in record.projections().items()}
    owner = _submodule(model, record.owner, record)
    if hasattr(owner, BRANCH_NAME):
        raise ConfigError(f"{record.owner!r} has an attribute {BRANCH_NAME!r} already: rename it before converting.")
    shares = {role: len(roles) for roles in record.shared_roles().values() for role in roles}
    sizes = {role: (int(m.in_features), int(m.out_features)) for role, m in projections.items()}
    expected = {
        "query": record.heads * record.head_dim,
        "key": record.heads * record.head_dim,
        "value": record.width,
    }
    for role, width in expected.items():
        if sizes[role][1] != width * shares[role]:
            raise UnknownProjectionError(
                f"{record.projections()[role]!r} answers {sizes[role][1]} channels, but the {role} of "
                f"{record.owner!r} has {record.heads} heads x {width // record.heads}"
                + (f", {shares[role]} roles in one projection" if shares[role] > 1 else "")
                + "."
            )
    widths = {r: (sizes[r][0], sizes[r][1] // shares[r]) for r in config.lora_targets if r in projections}
    device, dtype = _parameter_placement(projections["query"])
    return SaladBranch(record, config, gate_width=sizes["query"][0], widths=widths, dtype=dtype, device=device)


def _projection(model: nn.Module, name: str, record: SiteRecord) -> Any:
    module = _submodule(model, name, record)
    if not is_linear(module):
        raise UnknownProjectionError(
            f"{name!r} of the site {record.owner!r} is a {type(module).__name__}, not a projection."
        )
    return module


def _submodule(model: nn.Module, name: str, record: SiteRecord) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise UnknownProjectionError(
            f"{type(model).__name__} has no module {name!r}, which the site {record.owner!r} needs."
        ) from error


def _parameter_placement(projection: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype for a branch: those of the projection, or a trainable dtype when its storage is quantised."""
    parameters: list[torch.Tensor] = [*projection.parameters(), *projection.buffers()]
    device = parameters[0].device if parameters else torch.device("cpu")
    dtypes = [p.dtype for p in parameters if p.is_floating_point() and p.dtype.itemsize > 1]
    return device, dtypes[0] if dtypes else torch.float32


def _checked_config(config: SaladConfig | Mapping[str, Any] | None) -> SaladConfig:
    if config is None:
        return SaladConfig()
    if isinstance(config, Mapping):
        return SaladConfig.from_dict(config)
    if not isinstance(config, SaladConfig):
        raise ConfigError(f"config must be a SaladConfig or a dictionary of its fields, got {type(config).__name__}.")
    return config


def _require_same_config(known: Mapping[str, SaladBranch], config: SaladConfig, name: str) -> None:
    before = next(iter(known.values())).config
    if before != config:
        raise AlreadyConvertedError(
            f"{name or 'the model'} was converted before with another configuration (now != before): "
            f"{config.difference(before)}. Convert a fresh copy of the base model."
        )


def _require_eligible(model: nn.Module, sites: list[AttentionSite], config: SaladConfig) -> None:
    if not sites:
        raise NoAttentionError(
            f"the forward of {type(model).__name__} never called torch.nn.functional.scaled_dot_product_attention. "
            "Is an attention backend active that calls its own kernels (DIFFUSERS_ATTN_BACKEND, set_attention_backend)?"
        )
    if not any(site.eligible for site in sites):
        table = Plan(sites={"": sites}, config=config).to_text()
        raise NoEligibleSiteError(f"no attention call of {type(model).__name__} can be converted:\n{table}")
