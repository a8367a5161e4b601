"""export(model, directory): a fine-tuned model in the formats that other tools read, all of them or nothing."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn as nn

from salad_compile.analysis.inspection import summary
from salad_compile.analysis.summary import Summary
from salad_compile.common.checks import require_mapping
from salad_compile.common.files import write_directory_at_once
from salad_compile.common.logs import logger
from salad_compile.common.paths import as_path
from salad_compile.common.progress import ProgressBar
from salad_compile.common.sharding import is_first_rank
from salad_compile.common.wrappers import PIPELINE_COMPONENTS, bare_components
from salad_compile.errors import ExportError, MergeError, WriteError
from salad_compile.exchange.component import Component
from salad_compile.exchange.export_format import ExportFormat, ExportOptions
from salad_compile.exchange.export_report import ExportedFormat, ExportReport, SiteCastError
from salad_compile.exchange.formats import FORMATS, choose_formats
from salad_compile.exchange.model_card import model_card
from salad_compile.salad_files.contents import describe
from salad_compile.salad_files.location import is_repository_id
from salad_compile.sites.branch import branches

Result = TypeVar("Result")

HEADER_COPY = "salad_config.json"
CARD = "README.md"


@dataclass(frozen=True)
class _Export:
    """The formats and models to write, and the reasons why a format cannot hold a model."""

    components: list[Component]
    formats: list[ExportFormat]
    reasons: Mapping[tuple[str, str], str]  # component, format -> why not
    apart: bool  # each component has a set of its own
    options: ExportOptions


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
    temporary directory beside `directory`, which is renamed at the end.

    Args:
        model: a converted module (wrapped or not) or a diffusers pipeline. Of a pipeline with two experts each one that
            is converted gets a set of its own, in `directory/transformer` and `directory/transformer_2`.
        directory: made if necessary. An earlier export there is replaced as a whole.
        formats: of "salad" (exact, for `load`), "diffusers", "comfyui" and "peft" (LoRA alone, alpha / rank in B),
            "merged" (W + alpha / rank B A, summed in fp32 and cast once, in shards), and what `register_format` made
            known. None: all that can hold this model; the report says why not the others.
        base_model: Hub id or name of the base model, for the card; None: what the model's configuration says.
        training: facts for the card about the training (data, steps, metrics), of types that JSON can hold.
        max_shard_size: bytes, or "5GB", of a merged file.

    Under torch.distributed every rank must call it; rank 0 writes, and all ranks get the report or the error.

    Raises:
        ConfigError: an unknown format, or no model. NotConvertedError: nothing is converted.
        ExportError, MergeError: a format that was asked for by name cannot be written of this model.
        WriteError: the directory cannot be written, or holds something that no export wrote. Whatever is raised, the
        model and what was at `directory` are as they were.
    """
    chosen = choose_formats(formats)
    if training is not None:
        require_mapping(training, "facts of the training")
    modules = bare_components(model)
    target = as_path(directory).resolve()
    _on_first_rank(lambda: require_replaceable(target))
    parts = [Component.of(name, module) for name, module in modules.items() if branches(module)]
    if not parts:
        describe(next(iter(modules.values())))  # raises NotConvertedError
    reasons = _find_reasons(parts, chosen, required=formats is not None)
    for part in parts:
        part.gather(base=any(known.needs_base and (part.name, known.name) not in reasons for known in chosen))
    options = ExportOptions(base_model or _find_base_id(modules), max_shard_size)
    export = _Export(parts, chosen, reasons, len(modules) > 1, options)
    report = _on_first_rank(lambda: _write(export, target, training))
    logger.info("exported %s to %s", ", ".join(entry.format for entry in report.written), target)
    return report


# --- before anything is written --------------------------------------------------------------------------------------


def require_replaceable(target: Path) -> None:
    """Whether :func:`export` may write there. Replacing a directory deletes what is in it: only an export's may be.

    Raises:
        WriteError: it is a file, or holds something that no export wrote.
    """
    if not target.exists():
        return
    if not target.is_dir():
        raise WriteError(f"{target} is a file: pass a directory.")
    own = {HEADER_COPY, CARD, *PIPELINE_COMPONENTS, *(Path(known.place).parts[0] for known in FORMATS.values())}
    there = {entry.name for entry in target.iterdir()}
    foreign = sorted(there - own)
    if foreign or (there and HEADER_COPY not in there):
        what = f"{', '.join(foreign[:3])}, which no export wrote" if foreign else f"files, but no {HEADER_COPY}"
        raise WriteError(f"{target} holds {what}: pass a new directory, or that of an earlier export.")


def _find_reasons(parts: list[Component], formats: list[ExportFormat], *, required: bool) -> dict[tuple[str, str], str]:
    """Why a format cannot hold a component, by their names; raised where the formats are `required`."""
    reasons = {}
    for part in parts:
        for known in formats:
            try:
                known.require(part.model)
            except (ExportError, MergeError) as error:
                if required:
                    raise type(error)(f"{known.name}: {error}") from error
                reasons[part.name, known.name] = str(error)
    return reasons


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


def _find_base_id(modules: Mapping[str, nn.Module]) -> str | None:
    """The Hub id that diffusers noted in the configuration; None if that is a local path, or missing."""
    config = getattr(next(iter(modules.values())), "config", None)
    name = getattr(config, "_name_or_path", None)
    return name if isinstance(name, str) and is_repository_id(name) else None


# --- writing ---------------------------------------------------------------------------------------------------------


def _write(export: _Export, target: Path, training: Mapping[str, Any] | None) -> ExportReport:
    parts = export.components
    entries: list[ExportedFormat] = []
    bar = ProgressBar("export", len(parts) * len(export.formats))
    with write_directory_at_once(target) as temporary, bar:
        for part in parts:
            folder = temporary / part.name if export.apart else temporary
            _write_json(json.loads(part.header.to_json()), folder / HEADER_COPY)
            for known in export.formats:
                entries.append(_write_format(export, part, known, folder, temporary))
                bar.advance(note=known.name)
        if export.apart:
            _write_json({"components": [part.name for part in parts]}, temporary / HEADER_COPY)
        text = model_card(
            _summary(parts),
            {part.name: part.header.config for part in parts},
            {part.name: part.header.base_class for part in parts},
            entries,
            base_model=export.options.base_model,
            training=training,
        )
        (temporary / CARD).write_text(text)
    return ExportReport(target, entries, list(_cast_errors(parts, entries)), list(_remarks(parts)))


def _write_format(export: _Export, part: Component, known: ExportFormat, folder: Path, root: Path) -> ExportedFormat:
    """Write one format of one component into its set, or say why not."""
    where = "" if folder == root else folder.relative_to(root).as_posix()
    reason = export.reasons.get((part.name, known.name))
    if reason is not None:
        return ExportedFormat(part.name, known.name, where, reason=reason)
    path = folder / known.place
    written = known.write(part, path, export.options)
    return ExportedFormat(
        part.name,
        known.name,
        where,
        path.relative_to(root).as_posix(),
        written.tensors,
        sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()),
        merged=written.merged,
    )


def _write_json(values: Mapping[str, Any], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(values, indent=2) + "\n")


def _summary(parts: list[Component]) -> Summary:
    found = [(part.name, summary(part.model)) for part in parts]
    sites = [dataclasses.replace(site, component=name) for name, one in found for site in one.sites]
    return Summary(sites, sum(one.base_parameters for _, one in found))


def _cast_errors(parts: list[Component], entries: list[ExportedFormat]) -> Iterator[SiteCastError]:
    errors = {(entry.component, item.name): item.cast_error for entry in entries for item in entry.merged}
    for part in parts:
        for branch in branches(part.model).values():
            names = set(branch.record.projections().values())
            of_site = [errors[part.name, name] for name in names if (part.name, name) in errors]
            if of_site:
                yield SiteCastError(part.name, branch.record.owner, max(of_site))


def _remarks(parts: list[Component]) -> Iterator[str]:
    for part in parts:
        if part.header.config.train_base:
            name = part.name or part.header.base_class
            yield f"{name}: the base was trained too (train_base=True), and only the merged format holds its weights."
