"""torch.compile(model, backend="salad"): options -> passes -> lowering.

Found through the entry point `torch_dynamo_backends`, so that it works in a process that never imports this package.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from salad_compile.backend.announcements import announce
from salad_compile.backend.cpu_fusion import inner_compile, own_cache_keys
from salad_compile.backend.rejections import reject_plainly
from salad_compile.calls import autograd_functions
from salad_compile.calls.flash_family import find_family
from salad_compile.config import BackendOptions
from salad_compile.definition import patterns
from salad_compile.errors import ConfigError, did_you_mean
from salad_compile.kernels.listening import listen
from salad_compile.kernels.rows import decompositions
from salad_compile.passes.driver import run_passes
from salad_compile.passes.report import GraphReport
from salad_compile.sites import frozen_warning

_recorders: list[list[GraphReport]] = []


def know_functions() -> None:
    """Let Dynamo keep attention functions whole; before it looks at a model, that is when this module is loaded."""
    find_family(in_graphs=True)
    autograd_functions.keep_whole_in_graphs()


know_functions()


@reject_plainly
def salad(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """The Dynamo backend.

    Args:
        gm, example_inputs: what Dynamo captured.
        mode: a mode of torch.compile ("reduce-overhead", "max-autotune", ...), handed on to Inductor.
        options: see :class:`salad_compile.config.BackendOptions`.

    Raises:
        ConfigError: wrong options or mode; when the compiled graph is called. Whatever else is wrong is raised here, as
            itself (:mod:`salad_compile.backend.rejections`).
    """
    know_functions()  # what was imported since then
    try:
        parsed = BackendOptions.from_options(options)
    except ConfigError as error:
        if dict(options or {}).get("pattern", "topk") not in patterns.names():
            raise  # it may be registered before the next call
        return _refuse(error)
    frozen_warning.tell_of_inputs(example_inputs)
    report = run_passes(gm, parsed, example_inputs)
    for recorder in _recorders:
        recorder.append(report)
    announce(report, gm, example_inputs, parsed)
    return _lower(gm, example_inputs, parsed, mode)


def _refuse(error: ConfigError) -> Callable[..., Any]:
    """Stands for the compiled graph and raises the error whenever it is called.

    `torch._dynamo.config.suppress_errors` does not hide it then. Only for what depends on mode and options alone, which
    stay with the backend: torch keeps this graph, and an error about the model's state would be raised again after the
    user has mended it.
    """

    def refuse(*_: Any) -> Any:
        raise ConfigError(f'torch.compile(backend="salad"): {error}')

    return refuse


@contextlib.contextmanager
def record_graphs() -> Iterator[list[GraphReport]]:
    """Collect the report of every graph that is compiled meanwhile."""
    with listen(_recorders, []) as recorder:
        yield recorder


def _lower(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: BackendOptions, mode: str | None
) -> Callable[..., Any]:
    if options.lowering == "eager":
        return gm.forward
    if options.lowering == "aot_eager":
        # not documented; torch 2.11 and 2.13; most tests of this backend lower so
        return torch._dynamo.lookup_backend("aot_eager")(gm, list(example_inputs))
    # Inductor loads Triton and takes a second: only here
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    _teach_inductor()
    try:
        patches = {**_as_written(gm), **(list_mode_options(mode) if mode else {}), **options.inductor}
    except RuntimeError as error:
        return _refuse(ConfigError(f"unknown mode {mode!r}: {error}{did_you_mean(str(mode), list_mode_options())}"))
    with own_cache_keys():
        compiled: Any = compile_fx(
            gm, list(example_inputs), inner_compile=inner_compile, config_patches=patches or None
        )
    return compiled  # type: ignore[no-any-return]


def _as_written(gm: fx.GraphModule) -> dict[str, bool]:
    """Settings of Inductor by which an exchange goes on beside what stands between its halves.

    To save memory it would move both halves together (torch 2.11 and 2.13; tests/kernels/exchange/test_in_flight.py).
    """
    halves = any("salad.start_" in str(node.target) for node in gm.graph.nodes)
    return {"reorder_for_peak_memory": False, "reorder_for_locality": False} if halves else {}


@functools.cache
def _teach_inductor() -> None:
    """Enter our decompositions into Inductor's own table.

    A table of ours, passed to compile_fx, would become part of the key of Inductor's caches, which cannot pickle it:
    every process would compile anew (torch 2.13; tests/end_to_end/test_caches.py). `fast_random_decomps` keeps
    a copy of the table; it is private, seen in torch 2.11 and 2.13 (tests/salad_compile/backend/test_dynamo.py).
    """
    from torch._inductor import decomposition

    for operator, definition in decompositions().items():
        if operator not in decomposition.decompositions:
            decomposition.register_decomposition([operator])(definition)
    decomposition.fast_random_decomps.cache_clear()
