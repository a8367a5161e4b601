"""The variants of the method on real models: what discovery finds of a site must suit every one of them.

One case for each way in which a site can look: one stream, text in the same stream before and after the video, two
streams with a mask, grouped heads with a prefix of keys.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import salad_compile
from salad_compile.kernels import measure_executions
from salad_compile.sites.branch import branches
from tests.models.expectations import converted_sites
from tests.models.kinds import marks_of
from tests.models.registry import ALL_CASES
from tests.models.test_zoo import _fresh_dynamo
from tests.support import Recorder, assert_same, converted, differentiable, relative_error, run

FIXTURES = (_fresh_dynamo,)
WITHOUT_WINDOWS = {"HunyuanVideo": "mask", "Cosmos3Omni": "token grid"}
VARIANTS: dict[str, dict[str, Any]] = {
    "v2": {"scaling": "v2"},
    "head_gate": {"gate": "head", "scaling": "v2"},
    "no_gate": {"gate": "none"},
    "no_branch": {"linear_branch": False},
    "windows": {"pattern": "stswa"},
    "adjustable": {"lowest_sparsity": 0.3, "feature_map": "softmax"},
    "adjustable_windows": {"pattern": "stswa", "lowest_sparsity": 0.3, "gate": "none", "linear_branch": False},
}
# All of them on the plainest model, and on each other way in which a site can look what concerns it.
PAIRS = [
    *(("Wan", variant) for variant in VARIANTS),
    *(("CogVideoX", variant) for variant in ("head_gate", "windows", "adjustable")),
    *(("EasyAnimate", variant) for variant in ("v2", "adjustable_windows")),
    ("HunyuanVideo", "head_gate"),
    *(("Cosmos3Omni", variant) for variant in ("v2", "no_branch")),
]
# Without `--all-cases` those of the plainest model, and one for text in the same stream, a prefix and two streams. On
# the plainest not v2 and windows: others have v2, and `test_patterns_may_differ_between_layers` has windows.
BY_DEFAULT = [
    *(f"Wan-{variant}" for variant in VARIANTS if variant not in ("v2", "windows")),
    "CogVideoX-windows",
    "Cosmos3Omni-v2",
    "EasyAnimate-adjustable_windows",
]


@pytest.mark.parametrize(
    ("name", "variant"), [pytest.param(*pair, marks=marks_of("-".join(pair), BY_DEFAULT)) for pair in PAIRS]
)
def test_compiled_equals_uncompiled_and_is_saved(name: str, variant: str, tmp_path: Path) -> None:
    case, settings = ALL_CASES[name], VARIANTS[variant]
    model = converted(case, **settings)
    inputs = differentiable(case.inputs(0))
    with measure_executions() as executions:
        expected = run(model, inputs, case.output)
    sites = len(converted_sites(case))
    assert len(executions) == sites
    assert all(0.2 < execution.sparsity < 0.8 for execution in executions)
    loaded = salad_compile.load(case.build(), salad_compile.save(model, tmp_path / "salad.safetensors"))
    again = run(loaded, inputs, case.output, gradients=False).output
    assert torch.equal(again, expected.output)
    recorder = Recorder({"lowering": "eager"})
    for block in case.repeated_blocks:
        model.get_submodule(block).compile(backend=recorder)
    with measure_executions() as executions:
        actual = run(model, inputs, case.output)
    assert len(executions) == sites
    attention = "scaled_dot_product_attention"
    assert recorder.before[attention] - recorder.after[attention] == recorder.after["salad.block_sparse_attention"] > 0
    assert recorder.after["salad.tag"] == recorder.after["salad.site"] == 0
    assert_same(actual, expected, bound=1e-5, gradient_bound=1e-4)


@pytest.mark.parametrize("name", WITHOUT_WINDOWS)
def test_sites_that_windows_do_not_suit(name: str) -> None:
    with pytest.raises(salad_compile.PatternError, match=WITHOUT_WINDOWS[name]):  # type: ignore[attr-defined]
        converted(ALL_CASES[name], pattern="stswa")


@pytest.mark.parametrize("name", ["Wan", "CogVideoX", "EasyAnimate"])
def test_sparsity_zero_is_dense_with_windows_too(name: str) -> None:
    case = ALL_CASES[name]
    model = converted(case, randomise=False, sparsity=0.0, pattern="stswa")
    dense = run(case.build(), case.inputs(0), case.output, gradients=False).output
    assert relative_error(run(model, case.inputs(0), case.output, gradients=False).output, dense) < 1e-5


def test_patterns_may_differ_between_layers() -> None:
    case = ALL_CASES["Wan"]
    model = converted(case, overrides={"blocks.1.*": {"pattern": "stswa", "sparsity": 0.4}})
    assert [branch.decoded_spec().pattern for branch in branches(model).values()] == ["topk", "stswa"]
    expected = run(model, case.inputs(0), case.output)
    for block in model.blocks:  # type: ignore[union-attr]
        block.compile(backend=Recorder({"lowering": "eager"}))
    assert_same(run(model, case.inputs(0), case.output), expected, bound=1e-5, gradient_bound=1e-4)
