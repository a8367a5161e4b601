"""export(model, directory): a fine-tuned model in the formats that other tools read, all of them or nothing."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn as nn
from torch import Tensor

from salad_compile.analysis.inspection import summary
from salad_compile.analysis.summary import Summary
from salad_compile.calls.multihead import in_projection_owner
from salad_compile.checkpoints.location import FILE_NAME, is_repository_id
from salad_compile.checkpoints.salad_file import Header, base_class, branch_state, describe, write
from salad_compile.common.files import directory_written_at_once
from salad_compile.common.logs import logger
from salad_compile.common.sharding import is_first_rank, whole_state
from salad_compile.common.wrappers import PIPELINE_COMPONENTS, bare_components
from salad_compile.conversion.merge import MergedProjection
from salad_compile.errors import ConfigError, ExportError, MergeError, SaladError, WriteError, did_you_mean
from salad_compile.exchange import lora_files, merged
from salad_compile.exchange.export_report import ExportedFormat, ExportReport, SiteCastError
from salad_compile.exchange.low_rank import low_rank_updates, taken_apart
from salad_compile.exchange.model_card import model_card
from salad_compile.exchange.naming import WAN_CLASSES
from salad_compile.sites.branch import branches

Result = TypeVar("Result")

FORMATS = ("salad", "diffusers", "comfyui", "peft", "merged")
HEADER_COPY = "salad_config.json"
CARD = "README.md"

# where each format is in the set of one model; the LoRA of diffusers has the name that diffusers looks for
PLACES = {
    "salad": FILE_NAME,
    "diffusers": f"lora/{lora_files.DIFFUSERS_FILE}",
    "comfyui": f"lora/{lora_files.COMFYUI_FILE}",
    "peft": "lora/peft",
    "merged": "transformer",
}
_TOP_LEVEL = {HEADER_COPY, CARD, FILE_NAME, "lora", *PIPELINE_COMPONENTS}


@dataclass
class _Set:
    """What one component exports; tensors are there on the rank that writes."""

    component: str
    model: nn.Module
    header: Header
    branch_state: Mapping[str, Tensor] = field(default_factory=dict)
    base_state: Mapping[str, Tensor] = field(default_factory=dict)
    reasons: Mapping[str, SaladError] = field(default_factory=dict)  # of the formats that cannot be had


def export(
    model: Any,
    directory: str | os.PathLike[str],
    formats: str | Iterable[str] | None = None,
    *,
    base_model: str | None = None,
    training: Mapping[str, Any] | None = None,
    max_shard_size: int | str = "5GB",
) -> ExportReport:
    """Write a converted model to `directory` in the formats that other tools read, with a model card.

    salad_config.json and README.md are always written. The model is not changed. Everything is written into a
    directory beside `directory`, which takes its name in the end.

    Args:
        model: a converted module (wrapped or not) or a diffusers pipeline. Of a pipeline with two experts each one that
            is converted gets a set of its own, in `directory/transformer` and `directory/transformer_2`.
        directory: made if need be. What an earlier export left there is replaced, whole.
        formats: of "salad" (exact, for `load`), "diffusers", "comfyui" and "peft" (LoRA alone, alpha / rank in B) and
            "merged" (W + alpha / rank B A, summed in fp32 and cast once, in shards). None: all that this model can be
            written in; the report says why not the others.
        base_model: Hub id or name of the base model, for the card; None: what the model's configuration says.
        training: what the card tells of the training (data, steps, metrics), as JSON can hold it.
        max_shard_size: bytes, or "5GB", of a merged file.

    Under torch.distributed every rank must call it; rank 0 writes, and all ranks get the report or the error.

    Raises:
        ConfigError: an unknown format, or no model. NotConvertedError: nothing is converted.
        ExportError, MergeError: a format that was asked for by name cannot be written of this model.
        WriteError: the directory cannot be written, or holds something that no export wrote. Whatever is raised, the
        model and what was at `directory` are as they were.
    """
    asked = _checked_formats(formats)
    modules = bare_components(model)
    target = Path(directory).resolve()
    _on_first_rank(lambda: _require_replaceable(target))
    sets = [_prepared(name, module, asked) for name, module in modules.items() if branches(module)]
    if not sets:
        describe(next(iter(modules.values())))  # raises NotConvertedError
    if formats is not None:
        for error in (error for one in sets for error in one.reasons.values()):
            raise error
    apart = len(modules) > 1
    for one in sets:
        _gather(one, asked)

    def work() -> ExportReport:
        card = {"base_model": base_model or _known_base(modules), "training": training}
        return _write(sets, target, asked, apart, max_shard_size, card)

    report = _on_first_rank(work)
    logger.info("exported %s to %s", ", ".join(entry.format for entry in report.written), target)
    return report


# --- before anything is written --------------------------------------------------------------------------------------


def _checked_formats(formats: str | Iterable[str] | None) -> tuple[str, ...]:
    if formats is None:
        return FORMATS
    given = (formats,) if isinstance(formats, str) else tuple(formats)
    for name in given:
        if name not in FORMATS:
            raise ConfigError(f"unknown format {name!r}: {', '.join(FORMATS)}.{did_you_mean(str(name), FORMATS)}")
    if not given:
        raise ConfigError(f"no format to export: choose from {', '.join(FORMATS)}.")
    return tuple(name for name in FORMATS if name in given)


def _require_replaceable(target: Path) -> None:
    """Replacing a directory deletes what is in it: only what an export wrote may be."""
    if not target.exists():
        return
    if not target.is_dir():
        raise WriteError(f"{target} is a file: pass a directory.")
    there = {entry.name for entry in target.iterdir()}
    foreign = sorted(there - _TOP_LEVEL)
    if foreign or (there and HEADER_COPY not in there):
        what = f"{', '.join(foreign[:3])}, which no export wrote" if foreign else f"files, but no {HEADER_COPY}"
        raise WriteError(f"{target} holds {what}: pass a new directory, or that of an earlier export.")


def _prepared(component: str, model: nn.Module, asked: tuple[str, ...]) -> _Set:
    reasons: dict[str, SaladError] = {}
    for name in asked:
        try:
            _require_possible(model, name)
        except (ExportError, MergeError) as error:
            reasons[name] = error
    return _Set(component, model, describe(model), reasons=reasons)


def _require_possible(model: nn.Module, name: str) -> None:
    cls = base_class(model)
    if name == "merged":
        merged.require_mergeable(model)
    if name in ("salad", "merged"):
        return
    known = branches(model).values()
    if not any(branch.lora_roles for branch in known):
        raise ExportError(f"{name}: there is no LoRA (lora_rank=0, or merged), and gates have no place in a LoRA file.")
    for branch in known:
        for projection in branch.record.projections().values():
            if in_projection_owner(model, projection) is not None:
                raise ExportError(
                    f"{name}: {projection!r} is inside an nn.MultiheadAttention, whose own forward would not apply it."
                )
    if name == "comfyui" and cls not in WAN_CLASSES:
        raise ExportError(f"comfyui: the names that it uses are known for {' and '.join(WAN_CLASSES)}, not for {cls}.")
    if name == "diffusers" and not hasattr(model, "load_lora_adapter"):
        raise ExportError(f"diffusers: {cls} is no model that it loads LoRA into.")


def _gather(one: _Set, asked: tuple[str, ...]) -> None:
    """Bring all tensors together; a collective operation for sharded models."""
    state = whole_state(branch_state(one.model))
    one.branch_state = state if is_first_rank() else {}
    if "merged" in asked and "merged" not in one.reasons:
        one.base_state = merged.gathered_base(one.model, keep=is_first_rank())


def _on_first_rank(work: Callable[[], Result]) -> Result:
    """Run `work` on rank 0; every rank gets its result, or raises its error."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return work()
    outcome: list[Any] = [None]
    if is_first_rank():
        try:
            outcome = [work()]
        except Exception as error:
            outcome = [error]
    torch.distributed.broadcast_object_list(outcome)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    result: Result = outcome[0]
    return result


def _known_base(modules: Mapping[str, nn.Module]) -> str | None:
    """The Hub id that diffusers noted, if it is one and no local path."""
    config = getattr(next(iter(modules.values())), "config", None)
    name = getattr(config, "_name_or_path", None)
    return name if isinstance(name, str) and is_repository_id(name) else None


# --- writing ---------------------------------------------------------------------------------------------------------


def _write(
    sets: list[_Set],
    target: Path,
    asked: tuple[str, ...],
    apart: bool,
    max_shard_size: int | str,
    card: Mapping[str, Any],
) -> ExportReport:
    entries: list[ExportedFormat] = []
    with directory_written_at_once(target) as temporary:
        for one in sets:
            place = temporary / one.component if apart else temporary
            _write_json(json.loads(one.header.to_json()), place / HEADER_COPY)
            entries += [_written(one, name, place, temporary, max_shard_size, card["base_model"]) for name in asked]
        if apart:
            _write_json({"components": [one.component for one in sets]}, temporary / HEADER_COPY)
        text = model_card(
            _summary(sets),
            {one.component: one.header.config for one in sets},
            {one.component: one.header.base_class for one in sets},
            entries,
            **card,
        )
        (temporary / CARD).write_text(text)
    return ExportReport(target, entries, list(_cast_errors(sets, entries)), list(_remarks(sets)))


def _written(
    one: _Set, name: str, place: Path, root: Path, max_shard_size: int | str, base_model: str | None
) -> ExportedFormat:
    """Write one format of one component into its set, or say why not."""
    folder = place.relative_to(root).as_posix()
    where = "" if folder == "." else folder
    if name in one.reasons:
        return ExportedFormat(one.component, name, where, reason=str(one.reasons[name]).removeprefix(f"{name}: "))
    path = place / PLACES[name]
    rounding: list[MergedProjection] = []
    updates = low_rank_updates(one.model, one.branch_state)
    if name == "salad":
        write(one.branch_state, one.header, path)
        tensors: Mapping[str, Tensor] = one.branch_state
    elif name == "merged":
        tensors, rounding = merged.merged_state(one.base_state, updates)
        header = merged.merged_header(one.header, tensors, updates)
        merged.write_merged(one.model, tensors, merged.without_lora(one.branch_state), header, path, max_shard_size)
    else:
        if name != "peft":  # peft adapts the module it is given, fused or not; the others a freshly loaded one
            updates = taken_apart(one.model, updates)
        tensors = lora_files.write_lora(updates, path, name, base_model)
    return ExportedFormat(
        one.component,
        name,
        where,
        path.relative_to(root).as_posix(),
        len(tensors),
        sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()),
        merged=tuple(rounding),
    )


def _write_json(values: Mapping[str, Any], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(values, indent=2) + "\n")


def _summary(sets: list[_Set]) -> Summary:
    parts = [(one.component, summary(one.model)) for one in sets]
    sites = [dataclasses.replace(site, component=name) for name, part in parts for site in part.sites]
    return Summary(sites, sum(part.base_parameters for _, part in parts))


def _cast_errors(sets: list[_Set], entries: list[ExportedFormat]) -> Iterator[SiteCastError]:
    errors = {(entry.component, item.name): item.cast_error for entry in entries for item in entry.merged}
    for one in sets:
        for branch in branches(one.model).values():
            names = set(branch.record.projections().values())
            of_site = [errors[one.component, name] for name in names if (one.component, name) in errors]
            if of_site:
                yield SiteCastError(one.component, branch.record.owner, max(of_site))


def _remarks(sets: list[_Set]) -> Iterator[str]:
    for one in sets:
        if one.header.config.train_base:
            name = one.component or one.header.base_class
            yield f"{name}: the base was trained too (train_base=True), and only the merged format holds its weights."
