"""torch.export and AOTInductor: the passes of the backend on an exported program.

    program = torch.export.export(model, (), kwargs=inputs)        # model: converted; strict or not
    package_exported(program, "model.pt2")                         # or only rewrite_exported(program)

    import torch, salad_compile.kernels                            # in another process: no model, no conversion
    model = torch._inductor.aoti_load_package("model.pt2")

The package calls the operators of `salad_compile.kernels` through PyTorch's dispatcher. They are registered from
Python, so the process that loads a package needs Python and that import; a process of C++ alone cannot run it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from salad_compile.backend.cpu_fusion import no_outer_loop_fusion
from salad_compile.backend.exported_regions import inline_regions
from salad_compile.config import BackendOptions
from salad_compile.errors import SiteLostError, require_conversion
from salad_compile.kernels.rows import decompositions
from salad_compile.passes.context import graph_modules, has_converted_tags, has_sites
from salad_compile.passes.driver import run_passes


def rewrite_exported(program: ExportedProgram) -> ExportedProgram:
    """What `backend="salad"` would make of an exported program of a converted model.

    Args:
        program: from `torch.export.export`, strict or not, before any `run_decompositions`; it is left as it is.

    Returns:
        A program with the same inputs, outputs and weights (shared, not copied), whose converted sites are SALAD. It is
        functional, for inference, and can be run (`.module()`), saved (`torch.export.save`) and compiled
        (:func:`package_exported`).

    Raises:
        NotConvertedError: nothing in the program is a converted site.
        SiteLostError: a converted site would run dense.
    """
    graphs = [module.graph for module in graph_modules(program.graph_module)]
    require_conversion(
        any(has_converted_tags(graph) or has_sites(graph) for graph in graphs),
        "this exported program",
        "convert the model before exporting it, torch.export.export(salad_compile.convert(model), ...). "
        "A program that was rewritten needs no second time.",
    )
    rewritten = _copy(program)
    outputs = _output_names(rewritten.graph_module)
    inline_regions(rewritten.graph_module)
    try:
        # packages were never run with prepared operands on a GPU
        run_passes(rewritten.graph_module, BackendOptions(prepare_operands=False))
    except SiteLostError as error:
        raise SiteLostError(
            f"{error}\nIn an exported program also: run_decompositions() took the attention calls apart. Rewrite first."
        ) from error
    for before, after in zip(outputs, _output_names(rewritten.graph_module), strict=True):
        if before != after:
            rewritten.graph_signature.replace_all_uses(before, after)
    # Traces the spliced nodes once more: only then they are overloads with recorded values, as in any exported program.
    traced: ExportedProgram = rewritten.run_decompositions(decompositions())
    return traced


def package_exported(
    program: ExportedProgram, path: str | PathLike[str], *, inductor: Mapping[str, Any] | None = None
) -> str:
    """Rewrite an exported program of a converted model, and compile it into a package of AOTInductor.

    Like `torch._inductor.aoti_compile_and_package(rewrite_exported(program), package_path=path)`, which on a CPU is not
    protected from the wrong code that `cpu_fusion.py` is about.

    Args:
        program: see :func:`rewrite_exported`.
        path: of the package, ending in ".pt2".
        inductor: configuration patches for Inductor, as `torch._inductor.config` names them.

    Returns:
        The path, for `torch._inductor.aoti_load_package` in a process that has imported `salad_compile.kernels`.

    Raises:
        NotConvertedError, SiteLostError: see :func:`rewrite_exported`.
    """
    rewritten = rewrite_exported(program)
    with no_outer_loop_fusion():
        package: str = torch._inductor.aoti_compile_and_package(
            rewritten, package_path=path, inductor_configs=dict(inductor or {})
        )
    return package


def _copy(program: ExportedProgram) -> ExportedProgram:
    """A program with a graph of its own and the same weights."""
    module = copy.deepcopy(program.graph_module)
    return ExportedProgram(
        module,
        module.graph,
        copy.deepcopy(program.graph_signature),
        program.state_dict,
        program.range_constraints,
        program.module_call_graph,
        program.example_inputs,
        program.constants,
        verifiers=program.verifiers,
    )


def _output_names(module: fx.GraphModule) -> list[str]:
    """Names of the nodes that a program returns: its signature knows its outputs by them."""
    return [node.name for node in module.graph.output_node().all_input_nodes]
