"""merge_lora: the merged model computes the same, and what cannot be merged is refused before anything changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import salad_compile
from salad_compile.errors import BaseModelMismatchError, MergeError, NotConvertedError
from salad_compile.sites.branch import branches
from tests import toys
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
    model.blocks[1].attn1.to_v = toys.QuantisedLinear(24, 24)
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


class Quantised(torch.Tensor):
    """A weight in int8 with one scale, as quantisers have it: a wrapper without storage, which shows another dtype."""

    @staticmethod
    def __new__(cls, weight: Tensor) -> Quantised:
        made: Quantised = torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype)
        return made

    def __init__(self, weight: Tensor) -> None:
        self.scale = weight.detach().abs().max() / 127
        self.numbers = (weight.detach() / self.scale).round().to(torch.int8)

    def dequantize(self) -> Tensor:
        return self.numbers.float() * self.scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        return func(*tree_map_only(cls, cls.dequantize, args), **(kwargs or {}))


class Unreadable(Quantised):
    def dequantize(self) -> Tensor:
        raise NotImplementedError("no kernel")


def quantise(linear: torch.nn.Linear, kind: type[Quantised]) -> None:
    linear.weight = torch.nn.Parameter(kind(linear.weight), requires_grad=False)


def test_a_quantised_weight_is_refused_before_anything_is_written() -> None:
    case, model = CASES["Wan"], converted()
    quantise(model.blocks[1].attn1.to_k, Quantised)
    expected = run(model, case.inputs(0), case.output, gradients=False).output
    with pytest.raises(MergeError, match=r"blocks\.1\.attn1\.to_k.*Quantised.*dequantise=True"):
        salad_compile.merge_lora(model)
    assert torch.equal(run(model, case.inputs(0), case.output, gradients=False).output, expected)

    merged = salad_compile.merge_lora(model, dequantise=True)
    assert len(merged) == 8
    assert type(model.blocks[1].attn1.to_k.weight) is torch.nn.Parameter
    assert relative_error(run(model, case.inputs(0), case.output, gradients=False).output, expected) < 1e-5

    model = converted()
    quantise(model.blocks[1].attn1.to_k, Unreadable)
    before = model.blocks[0].attn1.to_q.weight.clone()
    with pytest.raises(MergeError, match="cannot be dequantised: NotImplementedError: no kernel"):
        salad_compile.merge_lora(model, dequantise=True)
    assert torch.equal(model.blocks[0].attn1.to_q.weight, before)


def tie_inside(model: Any) -> None:
    model.blocks[0].attn1.to_k.weight = model.blocks[0].attn1.to_q.weight


def tie_across(model: Any) -> None:
    model.blocks[1].attn1.to_v.weight = model.blocks[0].attn1.to_v.weight


def tie_to_other_modules(model: Any) -> None:
    model.blocks[1].attn2.to_q.weight = model.blocks[0].attn1.to_q.weight


def share_a_module(model: Any) -> None:
    model.blocks[1].attn1.to_q = model.blocks[0].attn1.to_q


def view_one_memory(model: Any) -> None:
    both = torch.randn(36, 24)
    model.blocks[0].attn1.to_q.weight = torch.nn.Parameter(both[:24])
    model.blocks[1].attn1.to_q.weight = torch.nn.Parameter(both[12:])


@pytest.mark.parametrize("tie", [tie_inside, tie_across, tie_to_other_modules, share_a_module, view_one_memory])
def test_tied_projections_are_refused_by_name(tie: Any) -> None:
    model = converted()
    tie(model)
    before = fingerprint(model)
    with pytest.raises(MergeError, match=r"'blocks\.[01]\.attn1\.to_.\.weight' shares its memory with 'blocks"):
        salad_compile.merge_lora(model)
    assert_unchanged(model, before)


def test_neighbours_in_one_memory_are_not_tied() -> None:
    model = converted()
    both = torch.randn(48, 24)
    model.blocks[0].attn1.to_q.weight = torch.nn.Parameter(both[:24])
    model.blocks[1].attn1.to_q.weight = torch.nn.Parameter(both[24:])
    assert len(salad_compile.merge_lora(model)) == 8


def test_a_weight_that_is_elsewhere_or_computed_is_refused(tmp_path: Path) -> None:
    model = converted()
    torch.nn.utils.parametrizations.weight_norm(model.blocks[1].attn1.to_q)
    with pytest.raises(MergeError, match=r"blocks\.1\.attn1\.to_q"):
        salad_compile.merge_lora(model)
    accelerate = pytest.importorskip("accelerate")
    model = converted()
    accelerate.cpu_offload(model, torch.device("cpu"))
    with pytest.raises(MergeError, match="merge before offloading"):
        salad_compile.merge_lora(model)
