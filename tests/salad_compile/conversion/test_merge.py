"""merge_lora: the merged model computes the same, and what cannot be merged is refused before anything changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import salad_compile
from salad_compile.errors import BaseModelMismatchError, MergeError, NotConvertedError
from salad_compile.sites.branch import branches
from tests.models.zoo import CASES
from tests.salad_compile.conversion.test_convert import assert_unchanged, fingerprint
from tests.salad_compile.salad_files.test_salad_file import converted
from tests.support import TINY, Recorder, randomise_branches, relative_error, run


@pytest.mark.parametrize("name", ["Wan", "handwritten_fused"])
def test_merged_equals_unmerged(name: str, tmp_path: Path) -> None:
    case, model = CASES[name], converted(name)
    expected = run(model, case.inputs(0), case.output, gradients=False).output
    base = run(case.build(), case.inputs(0), case.output, gradients=False).output
    assert relative_error(expected, base) > 1e-2
    merged = salad_compile.merge_lora(model)
    assert len(merged) == 2 * len(set(case.projections.values()))
    assert all(item.cast_error < 1e-5 for item in merged)
    assert not [n for n, _ in model.named_parameters() if "low_rank" in n]
    assert relative_error(run(model, case.inputs(0), case.output, gradients=False).output, expected) < 1e-5
    recorder = Recorder({"lowering": "eager"})
    compiled = torch.compile(model, backend=recorder)
    actual = run(compiled, case.inputs(0), case.output, parameters=model, gradients=False).output
    assert relative_error(actual, expected) < 1e-5
    # what is left, gates and projections, is saved and loaded onto the merged base
    path = salad_compile.save(model, tmp_path)
    bare = case.build()
    with pytest.raises(BaseModelMismatchError, match="merge_lora"):
        salad_compile.load(bare, path)
    assert not branches(bare)
    bare.load_state_dict({k: v for k, v in model.state_dict().items() if "salad" not in k})
    reloaded = run(salad_compile.load(bare, path), case.inputs(0), case.output, gradients=False).output
    assert relative_error(reloaded, expected) < 1e-5


def test_rounding_is_reported() -> None:
    model = converted().to(torch.bfloat16)
    assert all(1e-3 < item.cast_error < 1 for item in salad_compile.merge_lora(model))


def test_what_cannot_be_merged_is_refused() -> None:
    with pytest.raises(NotConvertedError):
        salad_compile.merge_lora(CASES["Wan"].build())
    model = converted()
    model.blocks[1].attn1.to_v = type("QuantisedLinear", (torch.nn.Linear,), {})(24, 24)
    before = fingerprint(model)
    with pytest.raises(MergeError, match=r"blocks\.1\.attn1\.to_v.*QuantisedLinear"):
        salad_compile.merge_lora(model)
    assert_unchanged(model, before)
    without = salad_compile.convert(
        CASES["Wan"].build(), {**TINY.to_dict(), "lora_rank": 0}, example_inputs=dict(CASES["Wan"].inputs(0))
    )
    randomise_branches(without)
    with pytest.raises(MergeError, match="no LoRA"):
        salad_compile.merge_lora(without)
