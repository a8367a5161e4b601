"""The Triton kernels of linear attention against the definition in fp64: states, outputs and all gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from salad_compile.kernels import UnsupportedKernelError, linear_output, linear_state
from salad_compile.kernels.linear import reference
from salad_compile.kernels.linear import triton as host
from salad_compile.kernels.linear_operands import Keys, Queries
from tests.kernels.helpers import FORWARD_BAR, cosine, make_qkv, relative_l2

pytestmark = pytest.mark.usefixtures("poisoned_memory")


class Definition:
    """The functions of `reference`, called as the operators are."""

    @staticmethod
    def linear_state(*given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return reference.linear_state(Keys(*given))

    @staticmethod
    def linear_output(*given: Any) -> torch.Tensor:
        return reference.linear_output(Queries(*given))


EPS = 1e-6
MAPS = ("relu", "elu", "softmax")
NARROW = (torch.bfloat16, torch.float16)
GRADIENT_BAR = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Case:
    """One draw of everything that the two operators take."""

    tokens: int
    dtype: torch.dtype
    feature_map: str = "relu"
    batch: int = 1
    heads: int = 2
    head_dim: int = 32
    value_dim: int = 32
    layout: str = "bshd"
    scale: float = 1.0
    masked: bool = False
    rotated: bool = False
    mean: float = 0.0  # of the values

    def __str__(self) -> str:
        flags = "".join(name for name, on in (("mask", self.masked), ("rotated", self.rotated)) if on)
        dtype = str(self.dtype).removeprefix("torch.")
        shape = f"b{self.batch}-d{self.head_dim}-{self.value_dim}"
        return f"{self.tokens}-{dtype}-{self.feature_map}-{shape}-{self.layout}-x{self.scale:g}-{flags}"


@dataclass
class Inputs:
    """The arguments: tensors that get gradients (query, key, value, then the rotated ones), a mask, and a gradient."""

    tensors: tuple[torch.Tensor, ...]
    key_mask: torch.Tensor | None
    grad: torch.Tensor

    @classmethod
    def of(cls, case: Case) -> Inputs:
        sizes = {"batch": case.batch, "heads": case.heads, "head_dim": max(case.head_dim, case.value_dim)}
        made = make_qkv(case.tokens, case.layout, case.dtype, scale=case.scale, **sizes)
        query, key = (x[..., : case.head_dim] for x in made[:2])
        value = (made[2].double() + case.mean).to(case.dtype)[..., : case.value_dim]
        tensors = (query, key, value)
        if case.rotated:
            turned = make_qkv(case.tokens, case.layout, case.dtype, seed=1, **sizes)
            tensors += tuple(x[..., : case.head_dim] for x in turned[:2])
        generator = torch.Generator().manual_seed(2)
        mask = torch.rand(case.batch, case.tokens, generator=generator) < 0.7 if case.masked else None
        if mask is not None:
            mask[:, 0] = True
        grad = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        # no gradient for rows whose denominator is about eps: rounding decides what they are
        grad = grad * _settled(query, key, case.feature_map, mask)
        return cls(tensors, mask, grad.to(case.dtype))

    def run(self, module: object, feature_map: str, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
        """Output and gradients, through the operators or through their definition."""
        leaves = [x.detach().to(device, dtype).requires_grad_() for x in self.tensors]
        rotated = leaves[3:] or (None, None)
        mask = None if self.key_mask is None else self.key_mask.to(device)
        state = module.linear_state(leaves[1], leaves[2], feature_map, mask, rotated[1])
        out = module.linear_output(leaves[0], *state, feature_map, EPS, rotated[0])
        return [out, *torch.autograd.grad(out, leaves, self.grad.to(device, dtype))]


class operators:
    linear_state, linear_output = staticmethod(linear_state), staticmethod(linear_output)


def _settled(query: torch.Tensor, key: torch.Tensor, feature_map: str, mask: torch.Tensor | None) -> torch.Tensor:
    ones = torch.ones(*key.shape[:3], 1, dtype=torch.float64)
    _, key_sum = Definition.linear_state(key.double(), ones, feature_map, mask)
    phi = reference.find_feature_map(feature_map)[0]
    return (phi(query.double()) * key_sum[:, :, None]).sum(-1, keepdim=True) > 1e3 * EPS


CASES = [
    Case(1, torch.bfloat16, "elu", batch=2, rotated=True),
    Case(2, torch.float16, "softmax", scale=4),
    Case(63, torch.float16, "relu", layout="fused", batch=3),
    Case(65, torch.bfloat16, "softmax", layout="bhsd", head_dim=16, value_dim=16, masked=True),
    Case(113, torch.float32, "relu", batch=2, layout="fused", masked=True),
    Case(113, torch.float32, "elu", head_dim=24, value_dim=40, rotated=True),
    Case(65, torch.float32, "softmax", head_dim=128, value_dim=128, heads=1),
    Case(203, torch.bfloat16, "relu", head_dim=64, value_dim=64, layout="fused"),
    Case(203, torch.float16, "elu", head_dim=80, value_dim=80, masked=True),
    Case(113, torch.bfloat16, "softmax", head_dim=96, value_dim=96, scale=4),
    Case(203, torch.bfloat16, "relu", head_dim=128, value_dim=128, scale=16),
    Case(113, torch.float16, "softmax", head_dim=128, value_dim=128, scale=16, masked=True),
    Case(203, torch.float16, "relu", head_dim=64, value_dim=128, scale=4, heads=1),
    Case(203, torch.bfloat16, "elu", head_dim=128, value_dim=48, heads=1, layout="bhsd", masked=True),
    Case(203, torch.bfloat16, "relu", head_dim=64, value_dim=64, rotated=True, masked=True),
    Case(113, torch.float16, "elu", head_dim=80, value_dim=80, rotated=True, scale=4),
    Case(1023, torch.bfloat16, "relu", batch=2, heads=1),
    Case(1023, torch.float16, "relu", heads=1, masked=True, scale=16),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_reference(case: Case, device: str) -> None:
    inputs = Inputs.of(case)
    ours = inputs.run(operators, case.feature_map, case.dtype, device)
    theirs = inputs.run(Definition, case.feature_map, torch.float64, "cpu")
    assert relative_l2(ours[0].cpu(), theirs[0]) <= FORWARD_BAR[case.dtype]
    for grad, exact in zip(ours[1:], theirs[1:], strict=True):
        assert grad.dtype == case.dtype
        assert grad.shape == exact.shape
        assert torch.isfinite(grad).all()
        assert cosine(grad.cpu(), exact) >= 0.9999
        assert relative_l2(grad.cpu(), exact) <= GRADIENT_BAR[case.dtype]


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW])
def test_a_single_token_reads_itself(dtype: torch.dtype, device: str) -> None:
    query, key, value = make_qkv(1, dtype=dtype)
    leaves = [x.to(device).requires_grad_() for x in (query, key, value)]
    out = linear_output(leaves[0], *linear_state(*leaves[1:], "elu"), "elu", EPS)
    grad = torch.randn(value.shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    grads = [x.cpu() for x in torch.autograd.grad(out, leaves, grad.to(device))]
    assert relative_l2(out.cpu(), value) <= FORWARD_BAR[dtype]
    assert relative_l2(grads[2], grad) <= FORWARD_BAR[dtype]
    # whatever the one weight is, it cancels: what is left is rounding
    assert all(x.abs().max() <= FORWARD_BAR[dtype] * grad.abs().max() for x in grads[:2])


@pytest.mark.parametrize("dtype", NARROW)
def test_gradients_survive_values_with_a_large_mean(dtype: torch.dtype, device: str) -> None:
    # KV is then almost a multiple of z in every column, and what the gradient of the query needs is the small rest.
    # The gradient of the key is left out: rounding the values to 16 bits already moves it as much.
    case = Case(1023, dtype, heads=1, mean=8.0)
    inputs = Inputs.of(case)
    ours = inputs.run(operators, case.feature_map, dtype, device)
    theirs = inputs.run(Definition, case.feature_map, torch.float64, "cpu")
    for index in (0, 1, 3):
        assert relative_l2(ours[index].cpu(), theirs[index]) <= 1e-2


@pytest.mark.parametrize("feature_map", MAPS)
def test_state_is_a_sum_in_fp32(feature_map: str, device: str) -> None:
    _, key, value = make_qkv(300, dtype=torch.float32, batch=2, heads=1)
    state, key_sum = linear_state(key.to(device), value.to(device), feature_map)
    expected_state, expected_sum = Definition.linear_state(key.double(), value.double(), feature_map)
    assert state.is_contiguous()
    assert state.dtype == key_sum.dtype == torch.float32
    assert relative_l2(state.cpu(), expected_state) <= 1e-6
    assert relative_l2(key_sum.cpu(), expected_sum) <= 1e-6


@pytest.mark.parametrize("factor", [40.0, 3e-4])
def test_fp16_neither_overflows_nor_vanishes(factor: float, device: str) -> None:
    query, key, value = make_qkv(600, dtype=torch.float16, batch=1, heads=1)
    tensors = [query * factor, key * factor, value * 10 + 20]
    wide = [x.double().requires_grad_() for x in tensors]
    narrow = [x.to(device).requires_grad_() for x in tensors]
    state, key_sum = linear_state(*narrow[1:], "relu")
    assert (state.max() > 65_504) == (factor > 1)
    out = linear_output(narrow[0], state, key_sum, "relu", 1e-9)
    exact = Definition.linear_state(*wide[1:], "relu")
    expected = Definition.linear_output(wide[0], *exact, "relu", 1e-9)
    assert relative_l2(out.cpu(), expected) <= FORWARD_BAR[torch.float16]
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).half() * min(1.0, factor * 100)
    ours = torch.autograd.grad(out, narrow, grad.to(device))
    theirs = torch.autograd.grad(expected, wide, grad.double())
    for got, exact in zip(ours, theirs, strict=True):
        assert torch.isfinite(got).all()
        assert relative_l2(got.cpu(), exact) <= 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW])
def test_rows_without_features_give_zero(dtype: torch.dtype, device: str) -> None:
    query, key, value = make_qkv(113, dtype=dtype, batch=1, heads=1)
    query[:, :, 10:20] = -query[:, :, 10:20].abs()
    leaves = [x.to(device).requires_grad_() for x in (query, key, value)]
    out = linear_output(leaves[0], *linear_state(*leaves[1:], "relu"), "relu", EPS)
    assert (out[:, :, 10:20] == 0).all()
    assert (out[:, :, :10].abs().sum(-1) > 0).all()
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert (grads[0][:, :, 10:20] == 0).all()
    assert (grads[0][:, :, :10] != 0).any()


def test_masked_keys_do_not_count(device: str) -> None:
    # neither do their values, whatever they are
    _, key, value = make_qkv(130, dtype=torch.bfloat16)
    mask = torch.rand(2, 130, generator=torch.Generator().manual_seed(4)) < 0.5
    rows = ~mask[:, None, :, None].expand(value.shape)
    key, value = key.masked_fill(rows, float("inf")), value.masked_fill(rows, float("nan"))
    leaves = [x.to(device).requires_grad_() for x in (key, value, key.relu())]
    for feature_map, rotated in (("relu", None), ("elu", None), ("softmax", leaves[2])):
        wanted = leaves[: 2 if rotated is None else 3]
        state, key_sum = linear_state(leaves[0], leaves[1], feature_map, mask.to(device), rotated)
        assert torch.isfinite(state).all()
        assert torch.isfinite(key_sum).all()
        for grad in torch.autograd.grad(state.sum() + key_sum.square().sum(), wanted):
            assert (grad.cpu()[rows] == 0).all()
            assert torch.isfinite(grad).all()
    empty = linear_state(leaves[0], leaves[1], "elu", torch.zeros_like(mask).to(device))
    assert (empty[0] == 0).all()
    assert (empty[1] == 0).all()


def test_expanded_gradients(device: str) -> None:
    qkv = [x.to(device).requires_grad_() for x in make_qkv(65, dtype=torch.bfloat16)]
    state = linear_state(*qkv[1:], "relu")
    out = linear_output(qkv[0], *state, "relu", EPS)
    expanded = torch.autograd.grad(out.sum(), qkv, retain_graph=True)  # the gradient of a sum has stride 0
    dense = torch.autograd.grad(out, qkv, torch.ones_like(out))
    for ours, theirs in zip(expanded, dense, strict=True):
        assert torch.equal(ours, theirs)
    state, key_sum = linear_state(*qkv[1:], "relu")
    (grad,) = torch.autograd.grad(state.sum() + key_sum.sum(), qkv[2])
    expected = qkv[1].detach().float().relu().sum(-1, keepdim=True).expand_as(grad)
    assert relative_l2(grad.cpu(), expected.cpu()) <= 5e-3


def test_any_innermost_stride(device: str) -> None:
    query, key, value = (x.to(device) for x in make_qkv(65, dtype=torch.bfloat16))
    expected = linear_output(query, *linear_state(key, value, "relu"), "relu", EPS)
    query, key, value = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (query, key, value))
    assert query.stride(-1) == 65
    assert torch.equal(linear_output(query, *linear_state(key, value, "relu"), "relu", EPS), expected)


def test_results_fill_poisoned_memory_in_model_layout(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = Inputs.of(Case(113, torch.bfloat16, masked=True, rotated=True, layout="fused"))
    expected = inputs.run(operators, "softmax", torch.bfloat16, device)
    plain = torch.Tensor.new_empty

    def poisoned(self: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        made = plain(self, *args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    again = inputs.run(operators, "softmax", torch.bfloat16, device)
    for first, second in zip(expected, again, strict=True):
        assert torch.equal(first, second)  # two runs are equal, bit by bit
        assert first.transpose(1, 2).is_contiguous()


def test_one_split_and_many(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = Inputs.of(Case(203, torch.float32))
    many = inputs.run(operators, "relu", torch.float32, device)
    monkeypatch.setattr(host, "split_count", lambda x, settings: 1)
    one = inputs.run(operators, "relu", torch.float32, device)
    for first, second in zip(many, one, strict=True):
        assert relative_l2(first, second) <= 1e-5


def test_inputs_are_left_alone(device: str) -> None:
    inputs = Inputs.of(Case(65, torch.bfloat16, layout="fused", masked=True, rotated=True))
    before = [x.clone() for x in inputs.tensors]
    inputs.run(operators, "elu", torch.bfloat16, device)
    for x, kept in zip(inputs.tensors, before, strict=True):
        assert torch.equal(x, kept)


def test_unsupported_is_refused(device: str) -> None:
    _, key, value = (x.to(device) for x in make_qkv(9, dtype=torch.float64))
    with pytest.raises(UnsupportedKernelError, match="float64"):
        linear_state(key, value, "relu")
    wide = torch.randn(1, 1, 5, 136, device=device)
    with pytest.raises(UnsupportedKernelError, match="head_dim 136"):
        linear_state(wide, wide, "relu")
    state, key_sum = torch.randn(1, 1, 16, 136, device=device), torch.randn(1, 1, 16, device=device)
    with pytest.raises(UnsupportedKernelError, match="head_dim 136"):
        linear_output(wide[..., :16], state, key_sum, "relu", EPS)
