"""`salad-compile plan MODEL`: what a conversion would do."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from salad_compile.command_line import model_arguments
from salad_compile.command_line.model_source import pipeline_components
from salad_compile.command_line.output import show

if TYPE_CHECKING:
    import torch.nn as nn

    from salad_compile.discovery.plan import Plan

HELP = """\
Runs one forward of a model without memory and lists its attention calls: which can be converted, and why not the
others. Weights are neither read nor made, so models that do not fit this machine can be planned too. Of a pipeline
with two transformers both are shown. Exit code 1: nothing can be converted.

example:
    salad-compile plan Wan2.1-T2V-1.3B-Diffusers
    salad-compile plan Wan2.1-T2V-1.3B-Diffusers --frames 121 --height 720 --width 1280 --json
    salad-compile plan my_models.py:VideoDiT --config small.json --inputs my_models.py:inputs
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, sizes, settings."""
    model_arguments.add_model(parser, weights=False)
    model_arguments.add_inputs(parser)
    model_arguments.add_settings(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; 1 if nothing is eligible."""
    found = _plan(arguments)
    show(arguments, found, eligible=len(found.eligible))
    return 0 if found.eligible else 1


def _plan(arguments: argparse.Namespace) -> Plan:
    import salad_compile

    config = model_arguments.settings_of(arguments)

    def act(model: nn.Module, inputs: Any) -> Plan:
        return salad_compile.plan(model, inputs, config=config, grid=arguments.grid, sites=arguments.sites)

    names = [arguments.component] if arguments.component else pipeline_components(arguments.model)
    if not names:
        return model_arguments.without_weights(arguments, act)
    plans = {name: model_arguments.without_weights(arguments, act, component=name) for name in names}
    if len(plans) == 1:
        return plans[names[0]]
    sites, grids = ({name: getattr(plan, field)[""] for name, plan in plans.items()} for field in ("sites", "grids"))
    return dataclasses.replace(plans[names[0]], sites=sites, grids=grids)
