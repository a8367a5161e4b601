"""A checkpoint of the base model with the low-rank updates in its weights, and the SALAD file beside it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.nn as nn
from torch import Tensor

from salad_compile.common.projections import laid_out, weight_name
from salad_compile.conversion.merge import MergedProjection, merged_weight
from salad_compile.conversion.mergeable import mergeable, require_untied
from salad_compile.errors import ExportError, MergeError
from salad_compile.exchange.component import Component
from salad_compile.exchange.low_rank import LowRank, is_fused_by_diffusers
from salad_compile.salad_files.contents import weight_sum
from salad_compile.salad_files.header import FORMAT_VERSION, Header
from salad_compile.salad_files.location import FILE_NAME
from salad_compile.salad_files.salad_file import write
from salad_compile.sites.branch import branches

# short: diffusers prints all of it when it loads the configuration
NOTE = "LoRA is merged; without salad_compile.load(model, directory) attention is dense, and this is another model"


def require_mergeable(model: nn.Module) -> None:
    """Check, before anything is gathered or written, that a checkpoint of the merged model can be written.

    Raises:
        MergeError: quantised, tied, or wrapped by another adapter. ExportError: from_pretrained builds another layout.
    """
    for branch in branches(model).values():
        require_untied(model, [item.key for item in mergeable(model, branch)])
        for name in branch.record.projections().values():
            if is_fused_by_diffusers(model, name):
                raise ExportError(
                    f"{name!r} was fused by fuse_qkv_projections, and from_pretrained builds the model apart. Export "
                    "the other formats, load salad.safetensors into a model that is fused, and merge_lora there."
                )
    if getattr(model, "config", None) is not None and _diffusers_config(model).get("quantization_config"):
        raise MergeError(f"{type(model).__name__} is quantised: load the base in 16 or 32 bits and merge there.")
    adapted = [name for name, _ in model.named_parameters() if ".base_layer." in name]
    if adapted:
        raise MergeError(f"another adapter is in the model ({adapted[0]!r}): unload or fuse it first.")


def merge_updates(
    model: nn.Module, state: Mapping[str, Tensor], updates: Sequence[LowRank]
) -> tuple[dict[str, Tensor], list[MergedProjection]]:
    """`state` with W + scale * B A in place of the weights that have an update; `state` itself does not change.

    Raises:
        MergeError: as :func:`require_mergeable`.
    """
    places = {item.name: item for branch in branches(model).values() for item in mergeable(model, branch)}
    weights, report = dict(state), []
    for update in updates:
        item = places[update.name]
        weight = state[item.key]
        added = laid_out(update.update().to(weight.device), weight, outputs_first=item.outputs_first)
        weights[item.key], cast_error = merged_weight(weight, added)
        report.append(MergedProjection(update.name, update.roles, cast_error))
    return weights, report


def write_checkpoint(
    component: Component, weights: Mapping[str, Tensor], directory: Path, max_shard_size: int | str
) -> None:
    """Write merged weights in shards with their index, `config.json`, and the SALAD file, which is not in the index."""
    from huggingface_hub import save_torch_state_dict

    header = _header_after_merging(component, weights)
    config = _diffusers_config(component.model)
    stem = "diffusion_pytorch_model" if config else "model"
    directory.mkdir(parents=True)
    # hub refuses parts of a larger storage, which gathered shards are when they do not divide evenly
    whole = {name: value if _is_whole_storage(value) else value.clone() for name, value in weights.items()}
    save_torch_state_dict(
        whole, directory, filename_pattern=stem + "{suffix}.safetensors", max_shard_size=max_shard_size
    )
    config["salad"] = {
        "merged": True,
        "file": FILE_NAME,
        "format_version": FORMAT_VERSION,
        "sites": len(header.sites),
        "sparsity": header.config.sparsity,
        "pattern": header.config.pattern,
        "note": NOTE,
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    write(_drop_lora(component.branch_state), header, directory / FILE_NAME)


def _header_after_merging(component: Component, weights: Mapping[str, Tensor]) -> Header:
    """The header without LoRA, and with the checksums that identify the merged base."""
    header = component.header
    if not component.updates:
        return header  # there was no LoRA, or it was merged before and the checksums are there
    keys = [
        [f"{name}.{weight_name(component.model.get_submodule(name))}" for name in record.projections().values()]
        for record in header.sites
    ]
    sums = tuple(weight_sum(weights[key].cpu() for key in names) for names in keys)
    return dataclasses.replace(header, config=dataclasses.replace(header.config, lora_rank=0), merged_weights=sums)


def _drop_lora(branch_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The branch state as merge_lora leaves it: no factors, and a scale of zero."""
    kept = {name: value for name, value in branch_state.items() if not name.endswith(("_down", "_up"))}
    return {name: value * 0 if name.endswith(".low_rank_scale") else value for name, value in kept.items()}


def _is_whole_storage(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def _diffusers_config(model: nn.Module) -> dict[str, Any]:
    """What diffusers would write to `config.json`; empty for a model of another library."""
    to_json = getattr(model, "to_json_string", None)
    known: dict[str, Any] = json.loads(to_json()) if callable(to_json) else {}
    return known
