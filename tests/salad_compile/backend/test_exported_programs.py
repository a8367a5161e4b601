"""torch.export and AOTInductor of a converted model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn

import salad_compile
from salad_compile.backend.exported_programs import package_exported, rewrite_exported
from salad_compile.errors import NotConvertedError
from tests import support, toys
from tests.models.zoo import CASES
from tests.support import count_ops, randomise_branches, relative_error

CONFIG = salad_compile.SaladConfig(
    compensation="none", sparsity=0.6, query_block=16, key_block=16, lora_rank=2, min_tokens=64
)
LENGTHS = {"x": {1: torch.export.Dim("tokens", min=64, max=512)}}


def converted(*calls: toys.Attend) -> nn.Module:
    """A site for each call, one with a position encoding and one without if not told otherwise."""
    model = toys.Stack(*map(toys.SelfAttention, calls or (toys.rotated_in_place, toys.positional))).eval()
    salad_compile.convert(model, CONFIG, example_inputs=(toys.tokens(),))
    randomise_branches(model)
    return model


# each way of tracing and each kind of length once
@pytest.mark.parametrize(
    ("strict", "lengths"),
    [
        pytest.param(True, None, id="strict-static"),
        pytest.param(False, LENGTHS, id="dynamic"),
        pytest.param(True, LENGTHS, id="strict-dynamic", marks=pytest.mark.all_cases),
        pytest.param(False, None, id="static", marks=pytest.mark.all_cases),
    ],
)
def test_a_rewritten_program_is_the_eager_twin(strict: bool, lengths: object) -> None:
    model = converted()
    program = torch.export.export(model, (toys.tokens(),), strict=strict, dynamic_shapes=lengths)  # type: ignore[arg-type]
    before = count_ops(program.graph_module)
    rewritten = rewrite_exported(program)
    after = count_ops(rewritten.graph_module)
    assert after["salad.block_sparse_attention"] == before["salad.tag"] == 2
    assert after["salad.tag"] == after["salad.site"] == 0
    assert count_ops(program.graph_module) == before, "the given program was changed"
    for count in (70,) if lengths is None else (70, 133):
        x = toys.tokens(count)
        assert relative_error(rewritten.module()(x), model(x)) < 1e-6


# strict tracing is Dynamo's, which the zoo takes through such forwards
@pytest.mark.parametrize("strict", [pytest.param(True, marks=pytest.mark.all_cases), False])
def test_a_model_on_a_grid_is_exported(strict: bool) -> None:
    """The forward of its root is ours, and torch.export asks it for what functions have."""
    case = CASES["Wan"]
    model, inputs = support.converted(case).eval(), dict(case.inputs(0))
    program = torch.export.export(model, (), kwargs=inputs, strict=strict)
    rewritten = rewrite_exported(program).module()
    assert relative_error(case.output(rewritten(**inputs)), case.output(model(**inputs))) < 1e-5


def test_what_is_not_converted_or_rewritten_already_is_an_error() -> None:
    with pytest.raises(NotConvertedError, match="program is not converted: convert the model before exporting it"):
        rewrite_exported(torch.export.export(toys.SelfAttention(), (toys.tokens(),)))
    rewritten = rewrite_exported(torch.export.export(converted(), (toys.tokens(),)))
    with pytest.raises(NotConvertedError, match="no second time"):
        rewrite_exported(rewritten)


LOADER = """
import sys, torch, salad_compile.kernels
x, out = torch.load(sys.argv[2])
model = torch._inductor.aoti_load_package(sys.argv[1])
error = float((model(x) - out).norm() / out.norm())
assert "salad_compile.conversion.convert" not in sys.modules
print(error)
"""


def test_a_package_runs_in_a_process_without_the_model(tmp_path: Path) -> None:
    model = converted(toys.rotated_in_place)
    program = torch.export.export(model, (toys.tokens(),), dynamic_shapes=LENGTHS)
    package = package_exported(program, str(tmp_path / "model.pt2"))
    x = toys.tokens(133)
    torch.save((x, model(x).detach()), tmp_path / "expected.pt")
    command = [sys.executable, "-c", LOADER, str(package), str(tmp_path / "expected.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-5
