"""The one helper behind the tests of passes and models: run, compare, count ops and parameters."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import torch.nn as nn
from torch import Tensor, fx

import salad_compile
from salad_compile.backend.dynamo import salad
from salad_compile.conversion import convert
from salad_compile.discovery.discover import Discovery, discover
from salad_compile.discovery.plan import Plan
from salad_compile.sites.branch import branches
from tests import shared

if TYPE_CHECKING:
    from tests.models.zoo import Case

# Small blocks, so that a few hundred tokens are several ragged blocks; everything else as users have it.
TINY = salad_compile.SaladConfig(
    compensation="none", sparsity=0.7, query_block=32, key_block=16, lora_rank=3, lora_alpha=6.0, min_tokens=90
)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw random numbers without disturbing anybody else's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def randomise_branches(model: nn.Module, seed: int = 0, scale: float = 0.2) -> None:
    """Give every branch parameter a different value: zero projections and zero `up` factors would hide everything."""
    with seeded(seed), torch.no_grad():
        for branch in branches(model).values():
            for parameter in branch.parameters():
                fan_in = parameter.shape[-1] if parameter.ndim > 1 else 1
                parameter.copy_(torch.randn(parameter.shape) * scale * (4 / fan_in) ** 0.5)


def converted(case: Case, *, randomise: bool = True, **changes: Any) -> nn.Module:
    """A case of the zoo, converted as :data:`TINY` says but for some changes, with branches that all contribute.

    The model is probed once in a session, whatever the configuration; everything after the probe is done anew.
    """
    with mock.patch.object(convert, "discover", functools.partial(_discover_once, case)):
        model = salad_compile.convert(
            case.build(), dataclasses.replace(TINY, **changes), example_inputs=dict(case.inputs(0)), grid=case.grid
        )
    if randomise:
        randomise_branches(model)
    return model


def probed(case: Case, model: nn.Module) -> Plan:
    """The plan for a model of the case, by a probe of its own, which later conversions of the case use."""
    with mock.patch.object(convert, "discover", functools.partial(_discover_anew, case)):
        return salad_compile.plan(model, dict(case.inputs(0)), config=TINY, grid=case.grid)


def _discover_anew(case: Case, model: nn.Module, inputs: Any, **settings: Any) -> Discovery:
    found = discover(model, inputs, **settings)
    shared.keep(_name(case, settings), found)
    return found


def _name(case: Case, settings: dict[str, Any]) -> str:
    return "-".join([case.name, *(f"{key}={value}" for key, value in sorted(settings.items()) if key != "grid")])


def _discover_once(case: Case, model: nn.Module, inputs: Any, **settings: Any) -> Discovery:
    """What `discover` finds. A probe that sees to positions sees everything that one without does."""
    everything = {**settings, "replay_position": True}
    found = shared.once(_name(case, everything), lambda: discover(model, inputs, **everything))
    if settings["replay_position"]:
        return found
    return dataclasses.replace(found, sites=[dataclasses.replace(site, position_fault=None) for site in found.sites])


@dataclass
class Result:
    """Output of a forward, and gradients of everything trainable by name (plain names, whatever wraps the model)."""

    output: Tensor
    gradients: dict[str, Tensor]


def run(
    model: Callable[..., Any],
    inputs: Mapping[str, Any],
    output: Callable[[Any], Tensor] = lambda out: out,
    *,
    parameters: nn.Module | None = None,
    gradients: bool = True,
) -> Result:
    """One forward and, with `gradients`, one backward of a fixed random projection of the output."""
    owner = parameters if parameters is not None else model
    assert isinstance(owner, nn.Module)
    owner.zero_grad(set_to_none=True)
    if not gradients:
        with torch.no_grad():
            return Result(output(model(**inputs)), {})
    out = output(model(**inputs))
    with seeded(99):
        (out * torch.randn(out.shape, dtype=out.dtype)).sum().backward()
    found = {
        name.replace("_orig_mod.", ""): p.grad.clone() for name, p in owner.named_parameters() if p.grad is not None
    }
    owner.zero_grad(set_to_none=True)
    return Result(out.detach(), found)


def differentiable(inputs: dict[str, Any]) -> dict[str, Any]:
    """Let the inputs have gradients: then the first block of a model is like the others, and all are one graph."""
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.is_floating_point() and "mask" not in name:
            value.requires_grad_()
    return inputs


def relative_error(value: Tensor, reference: Tensor) -> float:
    """||value - reference|| / ||reference||."""
    assert value.shape == reference.shape
    value, reference = value.detach().double(), reference.detach().double()
    return float((value - reference).norm() / reference.norm())


def assert_same(
    actual: Result,
    expected: Result,
    *,
    bound: float = 1e-5,
    gradient_bound: float = 1e-4,
    may_vanish: Callable[[str], bool] = lambda name: False,
) -> None:
    """Outputs and gradients agree to rounding; the same parameters have gradients, none of them zero or not finite.

    may_vanish: names whose gradient may be zero, or missing on one side: of what a model computes and then drops.
    """
    error = relative_error(actual.output, expected.output)
    assert error <= bound, f"outputs differ by {error:.2e}"
    actual, expected = (_without_vanished(result, may_vanish) for result in (actual, expected))
    assert actual.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        assert gradient.isfinite().all(), f"gradient of {name} is not finite"
        assert gradient.norm() > 0, f"gradient of {name} is zero: the comparison would be vacuous"
    grouped = _affine(actual.gradients)
    for name, gradient in _affine(expected.gradients).items():
        error = relative_error(grouped[name], gradient)
        assert error <= gradient_bound, f"gradients of {name} differ by {error:.2e}"


def _without_vanished(result: Result, may_vanish: Callable[[str], bool]) -> Result:
    kept = {name: g for name, g in result.gradients.items() if g.norm() > 0 or not may_vanish(name)}
    return Result(result.output, kept)


def _affine(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weight and bias of one affine map as one vector: a bias's gradient alone may be a sum that nearly cancels."""
    groups: dict[str, list[Tensor]] = {}
    for name, gradient in gradients.items():
        groups.setdefault(re.sub(r"(_|\.)bias$", r"\1weight", name), []).append(gradient.flatten())
    return {name: torch.cat(parts) for name, parts in groups.items()}


@dataclass
class Recorder:
    """A backend that hands on to salad and keeps the op counts of every graph before and after its passes."""

    options: dict[str, Any] = field(default_factory=lambda: {"lowering": "eager"})
    before: Counter[str] = field(default_factory=Counter)
    after: Counter[str] = field(default_factory=Counter)
    graphs: int = 0

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs += 1
        self.before += count_ops(gm)
        compiled = salad(gm, example_inputs, options=self.options)
        self.after += count_ops(gm)
        return compiled


def count_ops(gm: fx.GraphModule) -> Counter[str]:
    """Target name -> number of nodes, nested graphs included."""
    graphs = [module.graph for module in gm.modules() if isinstance(module, fx.GraphModule)]
    return Counter(target_name(node) for graph in graphs for node in graph.nodes if node.op.startswith("call"))


def target_name(node: fx.Node) -> str:
    """`scaled_dot_product_attention`, `salad.tag`, ..."""
    if isinstance(node.target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return str(node.target).removesuffix(".default")
    return getattr(node.target, "__name__", str(node.target))


def check_rewrite(
    model: nn.Module,
    inputs: Mapping[str, Any],
    output: Callable[[Any], Tensor] = lambda out: out,
    *,
    sites: int,
    fullgraph: bool = True,
    lowering: str = "eager",
) -> Recorder:
    """Compile a converted model and hold it against its eager twin.

    Output and gradients agree, every site is rewritten and no marker is left, and no parameter came or went.

    AOTAutograd ("aot_eager") takes as long again as Dynamo and our passes, and does not see which module an operator
    comes from: one test for each kind of graph asks for it.
    """
    names = [name for name, _ in model.named_parameters()]
    expected = run(model, inputs, output)
    recorder = Recorder({"lowering": lowering})
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=recorder, fullgraph=fullgraph)
    actual = run(compiled, inputs, output, parameters=model)
    assert_same(actual, expected)
    assert [name for name, _ in model.named_parameters()] == names
    assert recorder.after["salad.block_sparse_attention"] == sites
    assert recorder.before["salad.tag"] >= sites
    assert recorder.after["salad.tag"] == recorder.after["salad.site"] == 0
    attention = "scaled_dot_product_attention"
    assert recorder.before[attention] - recorder.after[attention] == sites
    return recorder
