"""summary(model) and explain(model, *inputs): what a conversion added, and what the backend does with it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn as nn

from salad_compile.analysis.summary import Explanation, SiteSummary, Summary
from salad_compile.common.wrappers import bare_components, single_model
from salad_compile.conversion.cost import site_cost
from salad_compile.kernels.repairs import repairs
from salad_compile.sites.branch import SaladBranch, base_parameters, branches, branches_in


def summary(model: Any) -> Summary:
    """Parameters added, target and measured sparsity and FLOPs of every converted site.

    Args:
        model: a converted module (wrapped or not) or pipeline.

    Raises:
        NotConvertedError: nothing in it is converted.
    """
    modules = bare_components(model)
    sites = [_summarise(component, branch) for component, branch in branches_in(modules)]
    redone = {str(device): found for device, found in repairs().items()}
    return Summary(sites=sites, base_parameters=sum(map(base_parameters, modules.values())), repairs=redone)


def _summarise(component: str, branch: SaladBranch) -> SiteSummary:
    own, lora = branch.counts()
    return SiteSummary(
        component=component,
        name=branch.record.owner,
        tokens=branch.record.tokens,
        heads=branch.record.heads,
        head_dim=branch.record.head_dim,
        branch_parameters=own,
        lora_parameters=lora,
        trainable_parameters=sum(p.numel() for p in branch.parameters() if p.requires_grad),
        target_sparsity=branch.target_sparsity,
        measured_sparsity=branch.measured_sparsity,
        engine=branch.engine,
        cost=site_cost(branch),
        dropped=branch.record.dropped,
        rotated_first=branch.record.rotated_first and branch.config.spec.maps_before_position,
    )


def explain(model: nn.Module, *inputs: Any, **keyword_inputs: Any) -> Explanation:
    """Compile and run one forward, and report what the backend rewrote, graph by graph, with reasons for the rest.

    The graphs run without Inductor, so this is quick; what the user compiled stays compiled. For a converted model the
    measured sparsity of its sites is noted for :func:`summary`. A model that was never converted is shown under the
    backend's default options.

    Raises:
        ConfigError: a pipeline was passed instead of its transformer.
        Whatever the model's forward raises.
    """
    from salad_compile.backend.dynamo import record_graphs, salad
    from salad_compile.kernels.measure import measure_executions, overall_sparsity

    bare = single_model(model, "explain")

    def backend(gm: torch.fx.GraphModule, example_inputs: list[torch.Tensor]) -> Any:
        return salad(gm, example_inputs, options={"lowering": "eager", "strict": False})

    with _uncompiled(bare), record_graphs() as graphs, measure_executions() as executions, torch.no_grad():
        torch.compile(bare, backend=backend)(*inputs, **keyword_inputs)
    known = list(branches(bare).values())
    if len(executions) == len(known):
        for branch, execution in zip(known, executions, strict=True):
            branch.measured_sparsity, branch.engine = execution.sparsity, execution.engine
    return Explanation(
        graphs=graphs,
        converted_sites=len(known),
        executions=len(executions),
        measured_sparsity=overall_sparsity(executions),
        engines=tuple(sorted({execution.engine for execution in executions})),
    )


@contextlib.contextmanager
def _uncompiled(model: nn.Module) -> Iterator[None]:
    """Set aside what Module.compile() put on submodules: cached graphs would not come by the backend again.

    `_compiled_call_impl` is private (torch 2.11 and 2.13; tests/salad_compile/analysis/test_inspection.py).
    """
    aside = {module: module.__dict__.pop("_compiled_call_impl", None) for module in model.modules()}
    try:
        yield
    finally:
        for module, compiled in aside.items():
            if compiled is not None:
                module.__dict__["_compiled_call_impl"] = compiled
