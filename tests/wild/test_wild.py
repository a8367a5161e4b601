"""Every video DiT class of the packages in requirements.txt: converted and right, or refused with a true reason.

The checks of a class follow one another, so that they can share one probe and one uncompiled run.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import salad_compile
from salad_compile.conversion import convert
from salad_compile.discovery.discover import Discovery, discover
from salad_compile.discovery.plan import Plan
from salad_compile.errors import SaladError
from salad_compile.sites.branch import branches
from tests.support import TINY, Recorder, Result, assert_same, randomise_branches, relative_error, seeded
from tests.wild import tables
from tests.wild.case import Wild, build, tensors
from tests.wild.rule import PACKAGES, video_classes
from tests.wild.stand_ins import open_site

open_site()
NAMES = tables.names()
REFUSED = [name for name in NAMES if tables.case(name).refused]
CONVERTED = [name for name in NAMES if name not in REFUSED]


def each(names: list[str]) -> pytest.MarkDecorator:
    """One test for each class; those of one class come together. Pytest shortens long ids."""
    return pytest.mark.parametrize("name", names, ids=names, scope="module")


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def case(name: str, request: pytest.FixtureRequest) -> Wild:
    """The entry; a check that the product is known to fail must fail."""
    found = tables.case(name)
    check = request.node.function.__name__.removeprefix("test_")
    if check in found.known:
        request.node.add_marker(pytest.mark.xfail(reason=found.known[check], strict=True))
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_every_class_that_the_rule_finds_has_an_entry_or_a_reason(package: str) -> None:
    found = {str(each) for each in video_classes(package)}
    told = {name for name in (*NAMES, *tables.without_entry()) if name.partition(".")[0] == package}
    missing = found - told
    assert not missing, f"no entry in tests/wild/models/{package}.py and no reason: {sorted(missing)}"
    gone = {name for name in tables.without_entry() if name.partition(".")[0] == package} - found
    assert not gone, f"a reason for what the rule does not find: {sorted(gone)}"


def call(case: Wild, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with case.around():
        return case.output(model(**inputs))


def dense_output(name: str, case: Wild) -> Tensor:
    with torch.no_grad():
        return call(case, build(name, case), case.inputs())


@functools.lru_cache(maxsize=4)
def plan_of(name: str) -> tuple[Plan, Discovery]:
    """The plan for a class, and what the probe of its model found."""
    case, found = tables.case(name), []

    def kept(model: nn.Module, inputs: Any, **settings: Any) -> Discovery:
        found.append(discover(model, inputs, **settings))
        return found[-1]

    with case.around(), mock.patch.object(convert, "discover", kept):
        plan = salad_compile.plan(build(name, case), case.inputs(), config=TINY)
    return plan, found[-1]


def converted(name: str, case: Wild, *, randomise: bool = True, **changes: Any) -> nn.Module:
    """The class, converted as :data:`TINY` says but for some changes. Everything after the probe is done anew."""
    found = plan_of(name)[1]
    with case.around(), mock.patch.object(convert, "discover", return_value=found):
        model: nn.Module = salad_compile.convert(
            build(name, case), dataclasses.replace(TINY, **changes), example_inputs=case.inputs()
        )
    if randomise:
        randomise_branches(model)
    return model


@functools.lru_cache(maxsize=2)
def uncompiled(name: str) -> Result:
    """What compiled ones must equal; every model of a class has the same weights."""
    case = tables.case(name)
    model = converted(name, case)
    result = forward_and_backward(case, model, case.inputs(), model)
    assert {key for key in result.gradients if ".salad." in key}, "nothing of SALAD has a gradient"
    return result


def forward_and_backward(case: Wild, model: nn.Module, inputs: dict[str, Any], owner: nn.Module) -> Result:
    """Output, and gradients of everything trainable."""
    owner.zero_grad(set_to_none=True)
    output = call(case, model, inputs)
    with seeded(99):
        (output * torch.randn(output.shape, dtype=output.dtype)).sum().backward()
    names = ((name.replace("_orig_mod.", ""), parameter) for name, parameter in owner.named_parameters())
    gradients = {name: parameter.grad.clone() for name, parameter in names if parameter.grad is not None}
    return Result(output.detach(), gradients)


def ran_before(name: str, case: Wild) -> nn.Module:
    """A converted model that has run uncompiled: some keep positions then that Dynamo cannot trace."""
    model = converted(name, case)
    with torch.no_grad():
        call(case, model, case.inputs())
    return model


def differentiable(inputs: dict[str, Any]) -> dict[str, Any]:
    """Let the first input, the video, have a gradient: then all blocks are one graph, the first too."""
    next(each for each in tensors(inputs) if each.is_floating_point()).requires_grad_()
    return inputs


def same(case: Wild, actual: Result, expected: Result) -> None:
    assert_same(
        actual,
        expected,
        bound=case.bound,
        gradient_bound=10 * case.bound,
        may_vanish=lambda name: any(part in name for part in case.vanish),
    )


@each(CONVERTED)
def test_sites(name: str, case: Wild) -> None:
    plan = plan_of(name)[0]
    assert tuple(site.name for site in plan.eligible) == case.sites, str(plan)


@each(CONVERTED)
def test_grid(name: str, case: Wild) -> None:
    plan = plan_of(name)[0]
    (found,) = plan.grids.values()
    if isinstance(found, str):
        assert case.grid is None, str(plan)
        assert case.flat in found
    else:
        assert tuple(found.grid(case.inputs())) == case.grid, str(plan)


@each(REFUSED)
def test_refusal(name: str, case: Wild) -> None:
    """The true reason, and the model as it was."""
    model = build(name, case)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(SaladError) as error, case.around():
        salad_compile.convert(model, TINY, example_inputs=case.inputs())
    assert case.refused in " ".join(str(error.value).split())
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


@each(CONVERTED)
def test_sparsity_zero(name: str, case: Wild) -> None:
    with torch.no_grad():
        salad = call(case, converted(name, case, randomise=False, sparsity=0.0), case.inputs())
        sparse = call(case, converted(name, case, randomise=False), case.inputs())
    dense = dense_output(name, case)
    assert dense.isfinite().all()
    assert relative_error(salad, dense) <= case.bound
    assert relative_error(sparse, dense) > 1e-4, "nothing is sparse: the check is vacuous"


@each(CONVERTED)
def test_compiled(name: str, case: Wild) -> None:
    """The whole model, then block by block: outputs and gradients as uncompiled."""
    model = ran_before(name, case)
    recorder = Recorder({"lowering": "eager"})
    compiled = torch.compile(model, backend=recorder, fullgraph=case.fullgraph)
    same(case, forward_and_backward(case, compiled, case.inputs(), model), uncompiled(name))
    if case.fullgraph:
        assert recorder.after["salad.block_sparse_attention"] == len(case.sites)
        assert recorder.after["salad.tag"] == recorder.after["salad.site"] == 0


@each(CONVERTED)
def test_per_block(name: str, case: Wild) -> None:
    model = ran_before(name, case)
    recorder = Recorder({"lowering": "eager"})
    for block in case.blocks:
        model.get_submodule(block).compile(backend=recorder)
    same(case, forward_and_backward(case, model, differentiable(case.inputs()), model), uncompiled(name))
    assert (recorder.after["salad.block_sparse_attention"] > 0) != case.breaks_inside


@each(CONVERTED)
def test_saved(name: str, case: Wild, tmp_path: Path) -> None:
    model = converted(name, case)
    file = salad_compile.save(model, tmp_path / "salad.safetensors")
    loaded = salad_compile.load(build(name, case), file)
    assert branches(loaded)
    with torch.no_grad():
        assert torch.equal(call(case, loaded, case.inputs()), call(case, model, case.inputs()))
