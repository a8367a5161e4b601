"""Preparing a model for training: it is converted, its base frozen, its branches trainable and in fp32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn

from salad_compile.common.logs import logger
from salad_compile.common.placement import placement
from salad_compile.common.reports import plural
from salad_compile.config import SaladConfig
from salad_compile.conversion.convert import convert
from salad_compile.errors import ConfigError, require_conversion
from salad_compile.latents import LatentDataset, LatentItem
from salad_compile.sites.branch import SaladBranch, branches
from salad_compile.training.families import Family
from salad_compile.training.seeds import derive_seed
from salad_compile.training.settings import TrainSettings
from salad_compile.training.tensors import trained_parameters

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def require_kinds(settings: object, latents: object, validation: object, forward: object) -> None:
    """Raises ConfigError: an argument of `train` is of another kind, as a path in the place of what is opened of it."""
    if not isinstance(settings, TrainSettings):
        raise ConfigError(f"settings are a TrainSettings(...), got a {type(settings).__name__}.")
    for name, data in (("latents", latents), ("validation", validation)):
        opened = hasattr(data, "names") and hasattr(data, "shapes")
        if not opened and (data is not None or name == "latents"):
            raise ConfigError(f"{name} are what open_latents(path) returns, got a {type(data).__name__}.")
    if forward is not None and not callable(forward):
        raise ConfigError(f"forward is a function, f(model, latents, timesteps, texts), got {forward!r:.80}.")


def require_alike(validation: LatentDataset, latents: LatentDataset, family: Family) -> None:
    """Whether held-out data are of the kind that the model is trained on.

    Raises:
        ConfigError: their latents, texts or conditions are of another size or model.
    """
    try:
        held, item = validation[0], latents[0]
        family.require_sizes(validation, held)
        family.check(validation)
        for what, found, wanted in (
            ("channels", held.latent.shape[0], item.latent.shape[0]),
            ("numbers in each token of a text", held.text.shape[1], item.text.shape[1]),
        ):
            if found != wanted:
                raise ConfigError(f"{held.name!r} has {found} {what}, and {item.name!r} of the training {wanted}.")
        family.inputs(family.validation_sample(held, 0, 0))  # names what it lacks
        _warn_of_items_in_both(validation, latents)
    except ConfigError as error:
        raise ConfigError(f"the validation data do not fit: {error}") from error


def _warn_of_items_in_both(validation: LatentDataset, latents: LatentDataset) -> None:
    """By name, and by the values of the first one: names of two sources may be the same by chance."""
    places = {name: index for index, name in enumerate(latents.names)}
    both = [index for index, name in enumerate(validation.names) if name in places]
    if both:
        held, item = validation[both[0]], latents[places[validation.names[both[0]]]]
        if torch.equal(held.latent, item.latent):
            logger.warning(
                "the validation data hold %s of the training data, %s first: their loss does not say what the model "
                "does with clips that it has not seen",
                *(plural(len(both), "item"), held.name),
            )


def require_converted(
    model: nn.Module,
    latents: LatentDataset,
    settings: TrainSettings,
    config: SaladConfig | Mapping[str, Any] | None,
    family: Family,
) -> None:
    """Convert the model if `config` is given, with the largest latent of the data as its example.

    Raises:
        NotConvertedError: it is not converted, and `config` is None.
        ConfigError: the conversion does not fit the settings. And what :func:`salad_compile.convert` raises.
    """
    known = branches(model)
    index = max(range(len(latents.shapes)), key=lambda i: torch.Size(latents.shapes[i]).numel())
    largest = latents[index]
    family.require_sizes(latents, largest)
    family.check(latents)
    family.require_used(largest)
    require_conversion(
        bool(known or config is not None),
        type(model).__name__,
        "call salad_compile.convert(model) first, or pass train(..., config=SaladConfig()).",
    )
    if config is not None:
        wanted = config if isinstance(config, SaladConfig) else SaladConfig.from_dict(config)
        _require_fit(wanted, settings)
        example = None if known else _example(model, largest, index, family)
        with torch.random.fork_rng():
            torch.manual_seed(derive_seed(settings.seed, "branches"))
            convert(model, wanted, example_inputs=example)
    _require_fit(next(iter(branches(model).values())).config, settings)
    _warn_of_contradictions(settings)


def _warn_of_contradictions(settings: TrainSettings) -> None:
    """Settings that are valid, each alone, and together are hardly meant."""
    if settings.sparsity_warmup >= settings.steps:
        logger.warning(
            "sparsity_warmup=%d, and the run has %d steps: it ends at a lower sparsity than the conversion's, which "
            "its file keeps",
            *(settings.sparsity_warmup, settings.steps),
        )
    if not settings.learning_rate:
        logger.warning("learning_rate=0: nothing is trained")


def _require_fit(config: SaladConfig, settings: TrainSettings) -> None:
    if config.train_base:
        raise ConfigError(
            "train_base=True: this trainer trains branches alone, and its checkpoints hold nothing of the base. "
            "Convert with train_base=False."
        )
    if settings.sparsity_warmup and config.lowest_sparsity is None:
        raise ConfigError(
            "sparsity_warmup needs a sparsity that may change: convert with SaladConfig(lowest_sparsity=...), the "
            "value that the warm-up starts from."
        )


def _example(model: nn.Module, item: LatentItem, index: int, family: Family) -> dict[str, Any] | None:
    """The inputs for an item; None for a forward of the user's, whose inputs nobody knows."""
    device, dtype = placement(model)  # not that of the first parameter: diffusers keeps some in fp32
    sample = family.validation_sample(item, index, 0)
    return family.inputs(sample.to(device, dtype))


def make_trainable(model: nn.Module, precision: str) -> None:
    """Freeze the base and cast it to `precision`; make the branches trainable, in fp32.

    Branches are cast where they meet activations, so their master weights may be finer than the base. Other libraries
    freeze them (`load_lora_weights` of diffusers does): that is said, and undone.
    """
    trained = trained_parameters(model)
    if not any(parameter.requires_grad for parameter in trained.values()):
        logger.warning(
            "all parameters of the branches were frozen, as diffusers' load_lora_weights and add_adapter leave them: "
            "they are made trainable again."
        )
    ours = {id(parameter) for parameter in trained.values()}
    others = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in ours]
    if others:
        logger.warning("%d parameters outside the branches are frozen now, %s first", len(others), others[0])
    for name, parameter in model.named_parameters():
        is_ours = id(parameter) in ours
        parameter.requires_grad_(is_ours)
        if is_ours:
            parameter.data = parameter.data.float()
        elif parameter.is_floating_point() and parameter.itemsize > 1 and not _keeps_fp32(model, name):
            parameter.data = parameter.data.to(DTYPES[precision])


def _keeps_fp32(model: nn.Module, name: str) -> bool:
    """Whether `from_pretrained` of diffusers would leave this parameter in fp32 whatever dtype is asked for.

    `_keep_in_fp32_modules` is private to diffusers (0.42): tests/salad_compile/training/test_preparation.py fails when
    it goes.
    """
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    return any(part in kept for part in name.split("."))


def mean_sparsity(known: Mapping[str, SaladBranch]) -> float:
    """The mean over the sites of the sparsity that is asked for just now."""
    return sum(branch.target_sparsity for branch in known.values()) / len(known)
