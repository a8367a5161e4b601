"""compile_pipeline(pipe): torch.compile with this backend, block by block, for each converted model of a pipeline."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, TypeVar

import torch.nn as nn

from salad_compile.common.logs import logger
from salad_compile.common.reports import plural
from salad_compile.common.wrappers import bare_components
from salad_compile.config import BackendOptions
from salad_compile.errors import require_conversion
from salad_compile.sites.branch import branches

Pipeline = TypeVar("Pipeline")

# Compiled here -> how. Compiling again in the same way would throw away what Dynamo has compiled.
_compiled: weakref.WeakKeyDictionary[nn.Module, dict[str, Any]] = weakref.WeakKeyDictionary()


def compile_pipeline(
    pipe: Pipeline, *, fullgraph: bool = False, mode: str | None = None, options: Mapping[str, Any] | None = None
) -> Pipeline:
    """Compile the `transformer` (and `transformer_2`) of a converted pipeline with backend="salad", in place.

    Block by block where the model names its blocks (diffusers' `compile_repeated_blocks`): they share one graph, and it
    compiles in a fraction of the time. Whole otherwise. Models that were never converted are left as they are: to make
    them block-sparse without training say `pipe.transformer.compile_repeated_blocks(backend="salad")`. A second call
    with the same arguments does nothing. The log (TORCH_LOGS="salad_compile") says what was compiled.

    Args:
        pipe: a diffusers pipeline, or one model, converted or loaded.
        fullgraph, mode, options: of `torch.compile`; see :class:`salad_compile.config.BackendOptions` for the options.

    Returns:
        `pipe`.

    Raises:
        NotConvertedError: no model of it is converted. ConfigError: neither a pipeline nor a model, or wrong options.
    """
    BackendOptions.from_options(options)  # else the first run would say it
    modules = bare_components(pipe)
    converted = {name: module for name, module in modules.items() if branches(module)}
    require_conversion(
        bool(converted),
        type(pipe).__name__,
        "salad_compile.convert(pipe) or salad_compile.load(pipe.transformer, file) comes first. Without either, "
        "pipe.transformer.compile_repeated_blocks(backend='salad') makes attention block-sparse without training.",
    )
    for name in modules.keys() - converted.keys():
        logger.warning("%s is not converted, and is left uncompiled", name)
    how = {"fullgraph": fullgraph, "mode": mode, "options": None if options is None else dict(options)}
    for name, module in converted.items():
        label = name or type(module).__name__
        if _compiled.get(module) == how:
            logger.info("%s is compiled in this way already", label)
            continue
        blockwise = compile_blocks(module, how)
        if not blockwise:
            module.compile(backend="salad", **how)
        _compiled[module] = how
        logger.info(
            "%s: %s, compiled %s",
            label,
            plural(len(branches(module)), "site"),
            "block by block" if blockwise else "whole",
        )
    return pipe


def compile_blocks(module: nn.Module, how: Mapping[str, Any], backend: str = "salad") -> bool:
    """Compile each repeated block of a model of diffusers; False, and nothing done, where it names no blocks.

    Args:
        how: of `torch.compile`.
    """
    per_block = getattr(module, "compile_repeated_blocks", None)
    if per_block is None:
        return False
    try:
        per_block(backend=backend, **how)
    except ValueError as error:  # of diffusers: the class names no blocks, or has none of that name
        logger.info("%s", error)
        return False
    return True
