"""The README.md of an export: base model, how to load each format, converted sites and training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from salad_compile.analysis.summary import Summary
from salad_compile.config import SaladConfig
from salad_compile.exchange.export_format import ExportFormat
from salad_compile.exchange.export_report import ExportedFormat
from salad_compile.exchange.formats import FORMATS


def model_card(
    summary: Summary,
    configs: Mapping[str, SaladConfig],
    classes: Mapping[str, str],
    formats: Sequence[ExportedFormat],
    *,
    base_model: str | None,
    training: Mapping[str, Any] | None,
) -> str:
    """The text of the card.

    Args:
        summary: of all components. configs, classes: configuration and class name of each component ("" for a model).
        formats: what was written and what was not. base_model: a Hub id or a name, None if it is not known.
        training: what is known of the training: data, steps, metrics; nested mappings become nested lists.
    """
    parts = [
        front_matter(base_model, [FORMATS[entry.format] for entry in formats if entry.path]),
        "# SALAD attention" + (f" for {base_model}" if base_model else ""),
        _what_it_computes(configs),
        "**LoRA files and merged weights also load without SALAD attention. What they compute then is not this "
        "model:** it has no gates and no linear branch, and it was trained with sparse attention.",
        _method(configs, classes),
        "## Load\n\n" + _loading(formats, classes),
        "## Files\n\n" + _files(formats),
        "## Training\n\n" + _training(training),
        "## Sites\n\n" + summary.to_markdown(),
    ]
    return "\n\n".join(parts) + "\n"


def front_matter(base_model: str | None, written: Sequence[ExportFormat]) -> str:
    """The YAML block that the Hub reads."""
    from huggingface_hub import ModelCardData

    relation = "finetune" if any(known.holds_base for known in written) else "adapter"
    data = ModelCardData(
        base_model=base_model,
        library_name=next((known.library for known in written if known.library), None),
        tags=["salad", "lora", "sparse-attention"],
        base_model_relation=None if base_model is None else relation,
    )
    return f"---\n{data.to_yaml().strip()}\n---"


def _what_it_computes(configs: Mapping[str, SaladConfig]) -> str:
    known = list(configs.values())
    parts = ["block-sparse softmax attention"]
    if any(config.compensation != "none" for config in known):
        parts.append("means of what it leaves out")
    if any(config.linear_branch for config in known):
        parts.append("gated linear attention")
    return (
        f"Self-attention of the base model is {' plus '.join(parts)} ([SALAD](https://arxiv.org/abs/2601.16515)), "
        "made with `salad_compile`."
    )


def _method(configs: Mapping[str, SaladConfig], classes: Mapping[str, str]) -> str:
    titles = ("sparsity", "pattern", "query x key block", "compensation", "LoRA rank", "LoRA alpha")
    rows = [("component", "class", *titles)]
    rows.append(tuple("---" for _ in rows[0]))  # type: ignore[arg-type]
    for name, config in configs.items():
        blocks, rank = f"{config.query_block} x {config.key_block}", config.lora_rank
        alpha = f"{config.lora_alpha or rank:g}" if rank else "none"
        means = "none" if config.compensation == "none" else f"means of {config.compensation_pool} tokens"
        settings = (f"{config.sparsity:g}", config.pattern, blocks, means, str(rank), alpha)
        rows.append((name or "(model)", classes[name], *settings))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _loading(formats: Sequence[ExportedFormat], classes: Mapping[str, str]) -> str:
    written = [entry for entry in formats if entry.path]
    lines = [
        FORMATS[entry.format].loading(entry.component, classes[entry.component], entry.set_path or ".")
        for entry in written
    ]
    warning = "`salad.safetensors` holds the LoRA too: loading a LoRA file on top of it would add the update twice."
    return "```python\n" + "\n".join(line for line in lines if line) + f"\n```\n\n{warning}"


def _files(formats: Sequence[ExportedFormat]) -> str:
    return "\n".join(
        f"- `{entry.path}`: {entry.format}" if entry.path else f"- {entry.format}: not exported, {entry.reason}"
        for entry in formats
    )


def _training(values: Mapping[str, Any] | None) -> str:
    """The sentence of what was gained, of a `training.json`, and everything that is known."""
    if not values:
        return "Nothing was recorded."
    outcome = values.get("outcome")
    if not isinstance(outcome, Mapping) or "sentence" not in outcome:
        return _bullets(values)
    rest = {name: value for name, value in outcome.items() if name != "sentence"}
    said = str(outcome["sentence"])
    return f"{said[:1].upper()}{said[1:]}.\n\n{_bullets({**values, 'outcome': rest})}"


def _bullets(values: Mapping[str, Any], indent: str = "") -> str:
    lines = []
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            lines += [f"{indent}- {name}:", _bullets(value, indent + "  ")]
        else:
            lines.append(f"{indent}- {name}: {'none' if value is None or value == {} else value}")
    return "\n".join(lines)
