"""convert(model): hang a SALAD branch on every eligible attention module; validates all before it changes anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch.nn as nn

from salad_compile.calls.multihead import in_projection_owner, projection, take_apart
from salad_compile.common.default_device import with_real_tensors
from salad_compile.common.foreign_hooks import forward_slot
from salad_compile.common.logs import logger
from salad_compile.common.reports import plural
from salad_compile.common.sharding import reshard
from salad_compile.common.undo import unchanged_on_failure
from salad_compile.common.wrappers import base_layer, components, without_base_layer
from salad_compile.config import SaladConfig
from salad_compile.conversion.branch_building import build_branch, submodule, widths_of
from salad_compile.conversion.channel_slots import channel_slots
from salad_compile.conversion.earlier_conversion import require_same_conversion, require_same_sites
from salad_compile.conversion.forecast import forecast
from salad_compile.conversion.placement import join_hooks, require_joinable
from salad_compile.conversion.selection import apply_settings, filter_sites
from salad_compile.discovery.attention_site import AttentionSite
from salad_compile.discovery.discover import Discovery, discover
from salad_compile.discovery.history import history
from salad_compile.discovery.plan import Plan
from salad_compile.errors import (
    ConfigError,
    NoAttentionError,
    NoEligibleSiteError,
    UnknownProjectionError,
    WrappedModelError,
)
from salad_compile.grid.rule import GridSource
from salad_compile.grid.video_grid import RootForward, VideoGrid
from salad_compile.position.slice import position_error
from salad_compile.sites.branch import SaladBranch, base_parameters, branches
from salad_compile.sites.converted_models import remember_model
from salad_compile.sites.markers import leave_dense
from salad_compile.sites.record import SiteRecord
from salad_compile.sites.site import DenseSwitch

ModelOrPipeline = TypeVar("ModelOrPipeline")


@with_real_tensors
def plan(
    model: Any, example_inputs: Any = None, *, config: SaladConfig | None = None, grid: Any = None, sites: Any = None
) -> Plan:
    """What :func:`convert` would do, without touching the model.

    Args:
        model: a module or a diffusers pipeline; weights may be on the meta device.
        example_inputs: tuple of positional inputs or dict of keyword inputs of the model's forward. Without them they
            are synthesised for diffusers-style models, at 480p with 81 frames.
        config: its `min_tokens` and `dense_layers` decide which sites are eligible.
        grid: (T, H, W), the tokens of the video along time, height and width, or a callable that gives them from the
            forward's arguments by name. None: found from the example inputs.
        sites: names of the sites to convert, or a list of them, with the wildcards of `fnmatch` ("blocks.1?.*"); a
            leading "!" leaves sites out. None: all that are eligible.

    Raises:
        InputsError, ProbeError, GridMismatchError: see :func:`salad_compile.discovery.discover.discover`.
        SiteFilterError: a pattern of `sites` or a glob of `config.overrides` matches no site.
        PatternError: a site's sparse pattern needs what the site does not have.
    """
    config = _checked_config(config)
    modules = components(model)
    found = {name: _discover(module, example_inputs, config, grid, sites) for name, module in modules.items()}
    return Plan(
        sites={name: discovery.sites for name, discovery in found.items()},
        config=config,
        grids={name: discovery.grid or discovery.grid_reason for name, discovery in found.items()},
        forecasts=[
            entry for name, module in modules.items() for entry in forecast(module, name, found[name].sites, config)
        ],
        base_parameters=sum(map(base_parameters, modules.values())),
    )


def _discover(module: nn.Module, example_inputs: Any, config: SaladConfig, grid: Any, sites: Any) -> Discovery:
    replay = config.spec.maps_before_position
    found = discover(module, example_inputs, min_tokens=config.min_tokens, grid=grid, replay_position=replay)
    chosen = filter_sites([_fitting(module, site) for site in found.sites], sites)
    return dataclasses.replace(found, sites=apply_settings(chosen, config))


def _fitting(model: nn.Module, site: AttentionSite) -> AttentionSite:
    """The site, no longer eligible where its projections answer other channels than the attention reads."""
    if not site.eligible:
        return site
    record = site.record()
    try:
        for roles in record.shared_roles().values():
            channel_slots(record, roles, widths_of(model, record.projections()[roles[0]], record)[1])
    except UnknownProjectionError as error:
        return dataclasses.replace(site, eligible=False, reason=str(error).removesuffix("."))
    return site


@with_real_tensors
def convert(
    model: ModelOrPipeline,
    config: SaladConfig | Mapping[str, Any] | None = None,
    *,
    example_inputs: Any = None,
    grid: Any = None,
    sites: Any = None,
) -> ModelOrPipeline:
    """Attach a SALAD branch (gate, projection, LoRA) to every eligible self-attention site, and return the model.

    Base parameters are frozen (unless `config.train_base`), branch parameters are trainable. State-dict keys of the
    base model do not change. A second call with the same configuration and `sites` changes nothing, except that it
    makes branch parameters trainable again that another library froze; without `sites` it takes those that there are.

    Args:
        model: a module, or a diffusers pipeline, whose `transformer` (and `transformer_2`) is converted.
        config: a :class:`SaladConfig` or a dictionary of its fields; None means the defaults.
        example_inputs, grid, sites: see :func:`plan`.

    Raises:
        ConfigError: a wrong configuration. AlreadyConvertedError: converted before with another one, with
            other `sites`, or as a part of another model.
        WrappedModelError: compiled, distributed or sharded before conversion.
        NoAttentionError: the forward calls no attention. NoEligibleSiteError: none that can be converted.
        InputsError, ProbeError, GridMismatchError, SiteFilterError, PatternError: see :func:`plan`.
        PositionReplayError: rope_placement="map-then-rotate", and the position encoding of a site cannot be replayed.
        Whatever is raised, the model is unchanged.
    """
    config = _checked_config(config)
    prepared = []
    for name, module in components(model).items():
        known = branches(module)
        if known:
            require_same_conversion(module, known, config, name)
            if sites is not None:
                again = _discover(module, example_inputs, config, grid, sites)
                require_same_sites(known, again, name)
            for branch in known.values():
                branch.requires_grad_(True)
            logger.info("%s is converted already: %s", name or type(module).__name__, plural(len(known), "site"))
            continue
        _require_whole(module)
        found = _discover(module, example_inputs, config, grid, sites)
        _require_eligible(module, found, config)
        _require_position(found, config)
        records = [site.record() for site in found.sites if site.eligible]
        prepared.append((module, prepare(module, records, config), _left_dense(found.sites), found.grid))
    for module, attachments, dense, rule in prepared:
        attach(module, attachments, config, dense, rule)
    return model


def _left_dense(sites: list[AttentionSite]) -> list[str]:
    """Query projections of self-attention that stays dense, and of no converted site."""
    converted = {name for site in sites if site.eligible for name in site.query}
    candidates = [s.query[0] for s in sites if s.kind in ("self", "joint") and not s.eligible and s.query]
    return [name for name in dict.fromkeys(candidates) if name not in converted]


def prepare(model: nn.Module, records: Iterable[SiteRecord], config: SaladConfig) -> list[SaladBranch]:
    """Build the branches of `records` without touching the model.

    Raises:
        UnknownProjectionError: a module that a record names is missing or is no projection of the recorded widths.
        WrappedModelError: the model is sharded, or offloaded with streams.
    """
    _require_whole(model)
    require_joinable(model)
    config = dataclasses.replace(config)  # one object for each model: by it the branches of one know each other
    with history():  # autograd refuses tensors that were made in inference mode
        return [build_branch(model, record, config) for record in records]


def attach(
    model: nn.Module,
    prepared: Sequence[SaladBranch],
    config: SaladConfig,
    dense: Iterable[str] = (),
    rule: GridSource | None = None,
) -> None:
    """Hang prepared branches on the model, and freeze its base.

    Args:
        dense: query projections of self-attention that stays dense; the backend must not take it for unconverted.
        rule: how to read the video's token grid from the arguments of the model's forward.

    Whatever is raised, the model is unchanged.
    """
    dense = tuple(dense)
    require_names(model, [branch.record for branch in prepared], dense)
    grid = None if rule is None else VideoGrid(rule, [branch.pattern.order for branch in prepared])
    switch = DenseSwitch()
    with unchanged_on_failure(model):
        if not config.train_base:
            for parameter in model.parameters():
                parameter.requires_grad_(False)
        take_apart(model, [name for branch in prepared for name in branch.record.projections().values()])
        for branch in prepared:
            owner = model.get_submodule(branch.record.owner)
            projections = branch.record.projections()
            modules = {
                role: base_layer(model.get_submodule(projections[role])) for role in branch.record.shared_roles()
            }
            branch.train(owner.training)
            branch.grid, branch.switch = grid, switch
            branch.attach(owner, modules)
            join_hooks(model, branch, modules["query"])
        remember_model(model)
        if grid is not None:
            root = RootForward(model, grid)
            forward_slot(model).set(root)
        for name in dense:
            if in_projection_owner(model, name) is not None:
                continue  # of an nn.MultiheadAttention that stays whole, which the passes leave alone
            base_layer(model.get_submodule(name)).register_forward_hook(leave_dense, with_kwargs=True)
    logger.info(
        "converted %s of %s at sparsity %s", plural(len(prepared), "site"), type(model).__name__, config.sparsity
    )


def require_names(model: nn.Module, records: Sequence[SiteRecord], dense: Iterable[str]) -> None:
    """Resolve every name of a conversion before anything is attached.

    Raises:
        UnknownProjectionError: the model has no such module.
    """
    for record in records:
        for name in (record.owner, *record.projections().values()):
            submodule(model, name, record)
    for name in dense:
        try:
            projection(model, name)
        except AttributeError as error:
            raise UnknownProjectionError(
                f"{type(model).__name__} has no module {name!r}, whose attention was to stay dense."
            ) from error


def dense_projections(model: nn.Module) -> list[str]:
    """The query projections of self-attention that the conversion left dense."""
    found = [name for name, module in model.named_modules() if leave_dense in module._forward_hooks.values()]
    return [without_base_layer(name) for name in found]


def _checked_config(config: SaladConfig | Mapping[str, Any] | None) -> SaladConfig:
    if config is None:
        return SaladConfig()
    if isinstance(config, Mapping):
        return SaladConfig.from_dict(config)
    if not isinstance(config, SaladConfig):
        raise ConfigError(f"config must be a SaladConfig or a dictionary of its fields, got {type(config).__name__}.")
    return config


def _require_whole(model: nn.Module) -> None:
    """The parameters of a branch would be beside the shards and not among them, and FSDP2 would not know of them."""
    reshard(model)  # after a forward the root's parameters are whole
    sharded = next((name for name, p in model.named_parameters() if type(p.data).__name__ == "DTensor"), None)
    if sharded is not None:
        raise WrappedModelError(
            f"the model is sharded already: {sharded} is a DTensor (fully_shard, tensor parallelism). Convert or load "
            "first, then shard."
        )


def _require_position(found: Discovery, config: SaladConfig) -> None:
    """As far as one forward tells; what it did not show is an error of the first run."""
    for site in found.sites:
        if not site.eligible or not site.position_fault or not config.of_site(site.name).spec.maps_before_position:
            continue
        if config.rope_placement == "map-then-rotate":
            raise position_error(site.name, *site.position_fault)
        logger.info("%s: rotate-then-map, because %s: %s", site.name or "the model", *site.position_fault)


def _require_eligible(model: nn.Module, found: Discovery, config: SaladConfig) -> None:
    sites = found.sites
    if not sites:
        raise NoAttentionError(
            f"the forward of {type(model).__name__} never called torch.nn.functional.scaled_dot_product_attention. "
            "Is an attention backend active that calls its own kernels (DIFFUSERS_ATTN_BACKEND, set_attention_backend)?"
        )
    if not any(site.eligible for site in sites):
        table = Plan(sites={"": sites}, config=config).to_text()
        raise NoEligibleSiteError(f"no attention call of {type(model).__name__} can be converted:\n{table}")
