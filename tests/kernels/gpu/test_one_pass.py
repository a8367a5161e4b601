"""The Triton kernels that pool and compute linear attention in one pass, against the definition in fp64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from salad_compile.kernels import UnsupportedKernelError, pool_and_read, pool_and_summarise
from salad_compile.kernels.capability import arch_of
from salad_compile.kernels.linear import reference as linear
from salad_compile.kernels.one_pass import cuda, plain, reference
from tests.kernels.helpers import FORWARD_BAR, cosine, make_order, make_qkv, relative_l2

EPS = 1e-6
FP32, PLAIN = torch.float32, (torch.bfloat16, 128)
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


# relu, bf16, head_dim 64 or 128, and nothing else: what has kernels of its own on Hopper
PLAIN_CASES = [
    Case(2, torch.bfloat16, head_dim=128, batch=2),  # of one token alone the query's gradient would be rounding
    Case(63, torch.bfloat16, head_dim=128, layout="bhsd"),
    Case(64, torch.bfloat16, head_dim=64, blocks=(64, 64), batch=3),
    Case(65, torch.bfloat16, head_dim=128, layout="fused", scale=4),
    Case(113, torch.bfloat16, head_dim=64, heads=1, scale=16),
    Case(129, torch.bfloat16, head_dim=128, blocks=(256, 256), batch=2, heads=3),
    Case(333, torch.bfloat16, head_dim=128, blocks=(128, 128), layout="fused", batch=2, scale=16),
    Case(1023, torch.bfloat16, head_dim=128, heads=1, scale=4),
]


@pytest.fixture
def plain_launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by the name of every kernel for the plain case that is launched."""
    names: list[str] = []
    launch = plain.launch

    def noted(kernel: Callable[..., object], *arguments: object, **options: object) -> None:
        names.append(kernel.__name__)
        launch(kernel, *arguments, **options)

    monkeypatch.setattr(plain, "launch", noted)
    return names


def plain_kernels(device: str) -> list[str]:
    """What `plain_launches` holds after one call of each operator."""
    on_hopper = arch_of(torch.empty(0, device=device).device)[0] == 9
    return ["plain_keys_kernel", "plain_queries_kernel"] if on_hopper else []


@pytest.mark.parametrize("case", PLAIN_CASES, ids=str)
def test_the_plain_case_equals_the_reference(case: Case, device: str, plain_launches: list[str]) -> None:
    check(case, device)
    assert plain_launches == plain_kernels(device)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_reference(case: Case, device: str, plain_launches: list[str]) -> None:
    check(case, device)
    assert plain_launches == []


def check(case: Case, device: str) -> None:
    """Compare values and gradients."""
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


@pytest.mark.parametrize(("dtype", "head_dim"), [(FP32, 16), (torch.bfloat16, 16), (torch.float16, 16), PLAIN])
def test_rows_without_features_give_zero(dtype: torch.dtype, head_dim: int, device: str) -> None:
    query, key, value = (x.to(device) for x in make_qkv(113, dtype=dtype, batch=1, heads=1, head_dim=head_dim))
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


@pytest.mark.parametrize(
    "case",
    [
        Case(203, torch.bfloat16, "elu", masked=True, ordered=True, layout="fused"),
        Case(203, torch.bfloat16, head_dim=128, heads=1, batch=2),
    ],
    ids=str,
)
def test_results_fill_poisoned_memory_and_repeat(case: Case, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = Inputs.of(case)
    expected = flat(*inputs.run(operators, torch.bfloat16, device))
    new_empty = torch.Tensor.new_empty

    def poisoned(self: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        made = new_empty(self, *args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    for first, second in zip(expected, flat(*inputs.run(operators, torch.bfloat16, device)), strict=True):
        assert torch.equal(first, second)  # two runs are equal, bit by bit
    assert expected[2].transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("head_dim", [32, 128])  # the general kernels, and those of the plain case
def test_one_split_and_many(head_dim: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = (x.to(device) for x in make_qkv(203, dtype=torch.bfloat16, heads=2, head_dim=head_dim))
    many = pool_and_summarise(key, value, None, 64, "relu")
    read = pool_and_read(query, *many[1:], None, 64, "relu", EPS)
    for module in (cuda, plain):
        monkeypatch.setattr(module, "split_count", lambda x, settings, share: 1)
    one = pool_and_summarise(key, value, None, 64, "relu")
    for first, second in zip(many[1:], one[1:], strict=True):
        assert relative_l2(first, second) <= 1e-5
    assert torch.equal(many[0], one[0])
    for first, second in zip(read, pool_and_read(query, *many[1:], None, 64, "relu", EPS), strict=True):
        assert torch.equal(first, second)


# --- the plain case -------------------------------------------------------------------------------------------------


def both(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, block: int = 64) -> list[torch.Tensor]:
    """Everything that the two operators return."""
    pooled_key, *state = pool_and_summarise(key, value, None, block, "relu")
    return [pooled_key, *state, *pool_and_read(query, *state, None, block, "relu", EPS)]


def check_values(results: list[torch.Tensor], inputs: list[torch.Tensor], block: int = 64) -> None:
    """Compare with `both` by definition, in fp64; sums and means to fp32."""
    query, key, value = (x.cpu().double() for x in inputs)
    pooled_key, *state = reference.pool_and_summarise(key, value, None, block, "relu")
    *sums, out = pooled_key, *state, *reference.pool_and_read(query, *state, None, block, "relu", EPS)
    for ours, theirs in zip(results, sums, strict=False):
        assert relative_l2(ours.cpu(), theirs) <= FORWARD_BAR[FP32]
    assert relative_l2(results[-1].cpu(), out) <= FORWARD_BAR[inputs[0].dtype]


def fused_views(tokens: int, channels: int, device: str) -> list[torch.Tensor]:
    """query, key and value (2, 2, S, channels), bf16, as views of one tensor."""
    generator = torch.Generator().manual_seed(3)
    fused = torch.randn(2, tokens, 3, 2, channels, generator=generator).bfloat16().to(device)
    return [fused[:, :, i].transpose(1, 2) for i in range(3)]


@pytest.mark.parametrize("tokens", [1, 70, 203])
def test_views_of_a_fused_tensor_are_read_in_place(tokens: int, device: str, plain_launches: list[str]) -> None:
    views = [x[..., 8:] for x in fused_views(tokens, 136, device)]
    results = both(*views)
    check_values(results, views)
    assert plain_launches == plain_kernels(device)
    for ours, theirs in zip(results, both(*(x.contiguous() for x in views)), strict=True):
        assert torch.equal(ours, theirs)


OTHERS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], int]] = {
    "odd-addresses": (lambda x: x[..., 1:129], 64),
    "odd-strides": (lambda x: x[..., :132].contiguous()[..., :128], 64),
    "stride-0": (lambda x: x[:, :1, :, :128].expand(2, 2, -1, -1), 64),
    "channels-apart": (lambda x: x[..., :128].transpose(2, 3).contiguous().transpose(2, 3), 64),
    "fp16": (lambda x: x[..., :128].half(), 64),
    "head-dim-96": (lambda x: x[..., :96], 64),
    "short-blocks": (lambda x: x[..., :128], 32),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_the_rest_is_read_through_pointers(kind: str, device: str, plain_launches: list[str]) -> None:
    view, block = OTHERS[kind]
    inputs = [view(x) for x in fused_views(203, 136, device)]
    check_values(both(*inputs, block), inputs, block)
    assert plain_launches == []


@pytest.mark.parametrize("scale", [1, 4, 16])
def test_large_sums(scale: int, device: str, plain_launches: list[str]) -> None:
    """Sums in fp32; a denominator that adds up thousands of large features, and one of a few small ones."""
    query, key, value = make_qkv(4001, dtype=torch.bfloat16, batch=1, heads=1, head_dim=128, scale=scale)
    key = (key.abs() + torch.arange(128) * scale).to(key.dtype)  # key_sum from thousands to millions
    query[:, :, ::2, 1:] = 0
    inputs = [x.to(device) for x in (query, key, value)]
    check_values(both(*inputs), inputs)
    assert plain_launches == plain_kernels(device)


def test_the_denominator_is_as_good_as_fp32(device: str) -> None:
    """Values that bf16 holds and a state made of the same sums leave the denominator as the only source of error."""
    query = make_qkv(130, dtype=torch.bfloat16, batch=1, heads=1, head_dim=128)[0].to(device)
    key_sum = torch.rand(1, 1, 128, generator=torch.Generator().manual_seed(5)).to(device) * 1e6
    state = torch.full((1, 1, 128, 128), 2.0**20, device=device)
    _, out = pool_and_read(query, state, key_sum, None, 64, "relu", EPS)
    features = query.double().relu()
    exact = (features @ state.double()) / ((features * key_sum[:, :, None]).sum(-1, keepdim=True) + EPS)
    assert (out == exact.to(torch.bfloat16)).float().mean() > 0.999
    assert relative_l2(out, exact) <= 2**-9


def test_unsupported_is_refused(device: str) -> None:
    _, key, value = (x.to(device) for x in make_qkv(40, dtype=FP32))
    with pytest.raises(UnsupportedKernelError, match="float64"):
        pool_and_summarise(key.double(), value.double(), None, 64, "relu")
    with pytest.raises(UnsupportedKernelError, match="block 48"):
        pool_and_summarise(key, value, None, 48, "relu")
    _, state, key_sum = pool_and_summarise(key, value, None, 64, "relu")
    with pytest.raises(UnsupportedKernelError, match="block 8"):
        pool_and_read(key, state, key_sum, None, 8, "relu", EPS)
