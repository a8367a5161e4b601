"""The Triton kernels that pool and compute linear attention in one pass, against the definition in fp64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from salad_compile.kernels import UnsupportedKernelError, pool_and_read, pool_and_summarise
from salad_compile.kernels.linear import reference as linear
from salad_compile.kernels.one_pass import cuda, reference

from ..helpers import FORWARD_BAR, cosine, make_order, make_qkv, relative_l2

EPS = 1e-6
FP32, NARROW = torch.float32, (torch.bfloat16, torch.float16)
GRADIENT_BAR = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Case:
    """One draw of everything that the two operators take."""

    tokens: int
    dtype: torch.dtype
    feature_map: str = "relu"
    head_dim: int = 32
    value_dim: int = 0  # as the head_dim where it is 0
    blocks: tuple[int, int] = (128, 64)  # of queries and of keys
    batch: int = 1
    heads: int = 2
    layout: str = "bshd"
    scale: float = 1.0
    ordered: bool = False
    masked: bool = False
    rotated: bool = False

    def __str__(self) -> str:
        flags = "".join(f"-{name}" for name in ("ordered", "masked", "rotated") if getattr(self, name))
        dtype = str(self.dtype).removeprefix("torch.")
        shape = f"d{self.head_dim}-{self.value_dim or self.head_dim}-{self.blocks[0]}x{self.blocks[1]}"
        return f"{self.tokens}-{dtype}-{self.feature_map}-{shape}-{self.layout}-x{self.scale:g}{flags}"


@dataclass
class Inputs:
    """Tensors that get gradients (query, key, value, then the rotated ones), an order, a mask, and a gradient."""

    case: Case
    tensors: tuple[torch.Tensor, ...]
    order: torch.Tensor | None
    mask: torch.Tensor | None
    grad: torch.Tensor

    @classmethod
    def of(cls, case: Case) -> Inputs:
        value_dim = case.value_dim or case.head_dim
        sizes = {"batch": case.batch, "heads": case.heads, "head_dim": max(case.head_dim, value_dim)}
        made = make_qkv(case.tokens, case.layout, case.dtype, scale=case.scale, **sizes)
        query, key, value = *(x[..., : case.head_dim] for x in made[:2]), made[2][..., :value_dim]
        tensors = (query, key, value)
        if case.rotated:
            turned = make_qkv(case.tokens, case.layout, case.dtype, seed=1, **sizes)
            tensors += tuple(x[..., : case.head_dim] for x in turned[:2])
        generator = torch.Generator().manual_seed(2)
        mask = torch.rand(case.batch, case.tokens, generator=generator) < 0.7 if case.masked else None
        if mask is not None:
            mask[:, 0] = True
            mask[:, 64:128] = False  # a block without a valid token
        grad = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        # no gradient for rows whose denominator is about eps: rounding decides what they are
        _, key_sum = linear.linear_state(key.double(), value.double(), case.feature_map, mask)
        features = linear.feature_map_named(case.feature_map)[0](query.double())
        grad = grad * ((features * key_sum[:, :, None]).sum(-1, keepdim=True) > 1e3 * EPS)
        order = make_order(case.tokens) if case.ordered else None
        return cls(case, tensors, order, mask, grad.to(case.dtype))

    def run(self, module: object, dtype: torch.dtype, device: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Means of keys and queries, then output and gradients."""
        query_block, key_block = self.case.blocks
        leaves = [x.detach().to(device, dtype).requires_grad_() for x in self.tensors]
        rotated = leaves[3:] or (None, None)
        order, mask = (None if x is None else x.to(device) for x in (self.order, self.mask))
        phi = self.case.feature_map
        pooled_key, *state = module.pool_and_summarise(leaves[1], leaves[2], order, key_block, phi, mask, rotated[1])
        pooled_query, out = module.pool_and_read(leaves[0], *state, order, query_block, phi, EPS, mask, rotated[0])
        grads = torch.autograd.grad(out, leaves, self.grad.to(device, dtype))
        return [pooled_key, pooled_query], [out, *grads]


def flat(means: list[torch.Tensor], results: list[torch.Tensor]) -> list[torch.Tensor]:
    return [*means, *results]


class operators:
    pool_and_summarise, pool_and_read = staticmethod(pool_and_summarise), staticmethod(pool_and_read)


CASES = [
    Case(1, torch.bfloat16, "elu", batch=2, rotated=True),
    Case(63, torch.float16, "relu", layout="fused", batch=3),
    Case(65, torch.bfloat16, "softmax", layout="bhsd", head_dim=16, blocks=(64, 64), ordered=True),
    Case(113, FP32, "elu", head_dim=24, value_dim=40, ordered=True, rotated=True),
    Case(113, FP32, "relu", batch=2, heads=1, layout="fused", masked=True, blocks=(64, 32)),
    Case(130, FP32, "softmax", head_dim=128, heads=1, ordered=True, masked=True),
    Case(203, torch.bfloat16, "relu", head_dim=64, layout="fused", masked=True),
    Case(203, torch.float16, "elu", head_dim=80, ordered=True, scale=4),
    Case(203, torch.bfloat16, "softmax", head_dim=96, ordered=True, masked=True, scale=4),
    Case(333, torch.bfloat16, "relu", head_dim=128, heads=1, ordered=True, scale=16),
    Case(203, torch.float16, "softmax", head_dim=128, heads=1, masked=True, scale=16),
    Case(203, torch.bfloat16, "elu", head_dim=128, value_dim=48, heads=1, layout="bhsd", rotated=True, masked=True),
    Case(113, torch.bfloat16, "relu", blocks=(16, 16), ordered=True, masked=True),
    Case(600, torch.float16, "relu", blocks=(256, 256), heads=1, ordered=True),
    Case(1023, torch.bfloat16, "relu", heads=1, ordered=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_reference(case: Case, device: str) -> None:
    inputs = Inputs.of(case)
    means, results = inputs.run(operators, case.dtype, device)
    exact_means, exact = inputs.run(reference, torch.float64, "cpu")
    for ours, theirs in zip(means, exact_means, strict=True):
        assert ours.dtype == FP32
        assert not ours.requires_grad
        assert relative_l2(ours.cpu(), theirs) <= FORWARD_BAR[FP32]
    assert relative_l2(results[0].cpu(), exact[0]) <= FORWARD_BAR[case.dtype]
    for grad, theirs in zip(results[1:], exact[1:], strict=True):
        assert cosine(grad.cpu(), theirs) >= 0.9999
        assert relative_l2(grad.cpu(), theirs) <= GRADIENT_BAR[case.dtype]


@pytest.mark.parametrize("feature_map", ["relu", "elu", "softmax"])
def test_state_is_a_sum_in_fp32(feature_map: str, device: str) -> None:
    _, key, value = make_qkv(300, dtype=FP32, batch=2, heads=1)
    order = make_order(300)
    _, state, key_sum = pool_and_summarise(key.to(device), value.to(device), order.to(device), 64, feature_map)
    _, *exact = reference.pool_and_summarise(key.double(), value.double(), order, 64, feature_map)
    for ours, theirs in zip((state, key_sum), exact, strict=True):
        assert ours.is_contiguous()
        assert relative_l2(ours.cpu(), theirs) <= 1e-6


def test_what_masked_rows_hold_does_not_count(device: str) -> None:
    query, key, value = make_qkv(130, dtype=torch.bfloat16, heads=1)
    mask = torch.rand(2, 130, generator=torch.Generator().manual_seed(4)) < 0.5
    rows = ~mask[:, None, :, None].expand(value.shape)
    broken = [
        x.masked_fill(rows, what).to(device) for x, what in ((query, torch.nan), (key, torch.inf), (value, torch.nan))
    ]
    kept = [x.masked_fill(rows, 0.5).to(device) for x in (query, key, value)]
    mask = mask.to(device)
    for feature_map in ("relu", "elu", "softmax"):
        first, second = (pool_and_summarise(x[1], x[2], None, 64, feature_map, mask) for x in (broken, kept))
        for ours, theirs in zip(first, second, strict=True):
            assert torch.equal(ours, theirs)
        first, second = (pool_and_read(x[0], *first[1:], None, 128, feature_map, EPS, mask) for x in (broken, kept))
        assert torch.equal(first[0], second[0])
        valid = mask[:, None, :, None].expand(first[1].shape)
        assert torch.equal(first[1][valid], second[1][valid])


@pytest.mark.parametrize("dtype", [FP32, *NARROW])
def test_rows_without_features_give_zero(dtype: torch.dtype, device: str) -> None:
    query, key, value = (x.to(device) for x in make_qkv(113, dtype=dtype, batch=1, heads=1))
    query[:, :, 10:20] = -query[:, :, 10:20].abs()
    _, *state = pool_and_summarise(key, value, None, 64, "relu")
    _, out = pool_and_read(query, *state, None, 64, "relu", EPS)
    assert (out[:, :, 10:20] == 0).all()
    assert (out[:, :, :10].abs().sum(-1) > 0).all()


def test_any_innermost_stride(device: str) -> None:
    inputs = [x.to(device) for x in make_qkv(65, dtype=torch.bfloat16)]
    columns = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in inputs]
    first, second = (pool_and_summarise(*x[1:], None, 32, "relu") for x in (inputs, columns))
    first, second = (
        (*sums, *pool_and_read(x[0], *sums[1:], None, 64, "relu", EPS))
        for x, sums in ((inputs, first), (columns, second))
    )
    for ours, theirs in zip(first, second, strict=True):
        assert torch.equal(ours, theirs)


def test_results_fill_poisoned_memory_and_repeat(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = Inputs.of(Case(203, torch.bfloat16, "elu", masked=True, ordered=True, layout="fused"))
    expected = flat(*inputs.run(operators, torch.bfloat16, device))
    plain = torch.Tensor.new_empty

    def poisoned(self: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        made = plain(self, *args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    for first, second in zip(expected, flat(*inputs.run(operators, torch.bfloat16, device)), strict=True):
        assert torch.equal(first, second)  # two runs are equal, bit by bit
    assert expected[2].transpose(1, 2).is_contiguous()


def test_one_split_and_many(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = Inputs.of(Case(113, FP32, blocks=(64, 32), heads=1, ordered=True))
    many = flat(*inputs.run(operators, FP32, device))
    monkeypatch.setattr(cuda, "split_count", lambda x, settings, share: 1)
    for first, second in zip(many, flat(*inputs.run(operators, FP32, device)), strict=True):
        assert relative_l2(first, second) <= 1e-5


def test_unsupported_is_refused(device: str) -> None:
    _, key, value = (x.to(device) for x in make_qkv(40, dtype=FP32))
    with pytest.raises(UnsupportedKernelError, match="float64"):
        pool_and_summarise(key.double(), value.double(), None, 64, "relu")
    with pytest.raises(UnsupportedKernelError, match="block 48"):
        pool_and_summarise(key, value, None, 48, "relu")
    _, state, key_sum = pool_and_summarise(key, value, None, 64, "relu")
    with pytest.raises(UnsupportedKernelError, match="block 8"):
        pool_and_read(key, state, key_sum, None, 8, "relu", EPS)
