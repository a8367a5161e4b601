"""The Triton kernels of block-sparse attention against the definition in fp64: outputs, lse and all gradients."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from salad_compile.kernels import KernelArgumentError, UnsupportedKernelError, block_sparse_attention
from salad_compile.kernels.block_sparse import reference
from salad_compile.kernels.block_sparse import triton as host
from salad_compile.kernels.block_sparse.deferred import raise_pending
from salad_compile.kernels.block_sparse.inverted_index import invert
from salad_compile.kernels.launch import interpreting
from salad_compile.kernels.layout import ALL_BLOCKS
from salad_compile.kernels.selection import Selection
from tests.kernels.helpers import FORWARD_BAR, LAYOUTS, cosine, make_qkv, make_selection, relative_l2

pytestmark = pytest.mark.usefixtures("poisoned_memory")

GRADIENT_BAR = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Case:
    """One draw of everything that the operator takes."""

    tokens: int
    dtype: torch.dtype
    blocks: tuple[int, int] = (128, 64)
    batch: int = 1
    heads: int = 2
    head_dim: int = 64
    value_dim: int = 64
    layout: str = "bshd"
    scale: float = 1.0
    permille: int = 400
    masked: bool = False
    unaligned: bool = False  # no row begins where the bulk copy engine could read it
    text_blocks: int = 0  # query blocks at the end that attend to everything
    seed: int = 0

    def __str__(self) -> str:
        flags = "".join(name for name, on in (("mask", self.masked), ("odd", self.unaligned)) if on)
        dtype = str(self.dtype).removeprefix("torch.")
        blocks = "x".join(map(str, self.blocks))
        return f"{self.tokens}-{dtype}-{blocks}-b{self.batch}-d{self.head_dim}-{self.layout}-x{self.scale:g}-{flags}"


@dataclass
class Inputs:
    """The operator's arguments, in the dtype of the case."""

    qkv: tuple[torch.Tensor, ...]
    lut: torch.Tensor
    count: torch.Tensor
    key_mask: torch.Tensor | None
    grad: torch.Tensor

    @classmethod
    def of(cls, case: Case) -> Inputs:
        sizes = {"batch": case.batch, "heads": case.heads, "head_dim": max(case.head_dim, case.value_dim)}
        query, key, value = make_qkv(case.tokens, case.layout, case.dtype, scale=case.scale, seed=case.seed, **sizes)
        query, key, value = query[..., : case.head_dim], key[..., : case.head_dim], value[..., : case.value_dim]
        if case.unaligned:
            query, key, value = (odd_strides(x) for x in (query, key, value))
        lut, count = make_selection(query, key, *case.blocks, case.permille)
        count = count.clone()
        if case.text_blocks:
            count[:, :, -case.text_blocks :] = ALL_BLOCKS
        generator = torch.Generator().manual_seed(case.seed + 7)
        key_mask = None
        if case.masked:
            key_mask = torch.rand(case.batch, case.tokens, generator=generator) < 0.7
            key_mask[:, : case.tokens // 3] &= torch.rand(case.batch, 1, generator=generator) < 0.5
        grad = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(case.dtype)
        return cls((query, key, value), lut, count, key_mask, grad)

    def selection(self, case: Case) -> Selection:
        return Selection(self.lut, self.count, *case.blocks, case.head_dim**-0.5, self.key_mask)

    def run(self, case: Case) -> tuple[torch.Tensor, ...]:
        """out, lse, grad_query, grad_key, grad_value of the operator."""
        qkv = [x.detach().requires_grad_() for x in self.qkv]
        out, lse = block_sparse_attention(*qkv, *self.selection(case))
        return (out.detach(), lse, *torch.autograd.grad(out, qkv, self.grad))

    def to(self, device: str) -> Inputs:
        """All of them on a device, with the strides they have."""

        def moved(x: torch.Tensor) -> torch.Tensor:
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x)

        key_mask = None if self.key_mask is None else self.key_mask.to(device)
        qkv = tuple(moved(x) for x in self.qkv)
        return Inputs(qkv, self.lut.to(device), self.count.to(device), key_mask, moved(self.grad))

    def expected(self, case: Case) -> tuple[torch.Tensor, ...]:
        """The same by the definition, in fp64 on the rounded inputs."""
        wide = [x.detach().double().requires_grad_() for x in self.qkv]
        out, lse = reference.block_sparse_attention(*wide, self.selection(case))
        return (out.detach(), lse, *torch.autograd.grad(out, wide, self.grad.double()))

    def dense_gradients(self, case: Case) -> tuple[torch.Tensor, ...]:
        """Gradients of PyTorch's own attention on the same selection and in the same dtype: the yardstick."""
        mask = reference.token_mask(self.selection(case), case.tokens)
        # contiguous: for rows at odd addresses some dtypes have no kernel there
        narrow = [x.detach().contiguous().requires_grad_() for x in self.qkv]
        return torch.autograd.grad(F.scaled_dot_product_attention(*narrow, attn_mask=mask), narrow, self.grad)


def odd_strides(x: torch.Tensor) -> torch.Tensor:
    """x (B, H, S, D) in rows of D + 1 channels, tokens before heads."""
    batch, heads, tokens, head_dim = x.shape
    return x.new_empty(batch, tokens, heads, head_dim + 1)[..., 1:].transpose(1, 2).copy_(x)


def check(case: Case, device: str) -> None:
    inputs = Inputs.of(case).to(device)
    out, lse, *grads = inputs.run(case)
    expected_out, expected_lse, *expected_grads = inputs.expected(case)
    assert out.dtype == case.dtype
    assert out.transpose(1, 2).is_contiguous()
    assert relative_l2(out, expected_out) <= FORWARD_BAR[case.dtype]
    seen = torch.isfinite(expected_lse)
    assert torch.equal(torch.isfinite(lse), seen)
    torch.testing.assert_close(lse[seen].double(), expected_lse[seen].double(), rtol=1e-4, atol=1e-3)
    assert (out[~seen] == 0).all()
    assert (grads[0][~seen] == 0).all()
    yardsticks = inputs.dense_gradients(case) if case.scale > 1 else expected_grads
    for grad, exact, yardstick in zip(grads, expected_grads, yardsticks, strict=True):
        assert grad.dtype == case.dtype
        assert torch.isfinite(grad).all()
        if float(exact.norm()) == 0:  # one key: the weights are all 1, whatever query and key are
            assert float(grad.abs().max()) < 1e-3
            continue
        if tolerable := cosine(yardstick, exact) >= 0.99995:
            assert cosine(grad, exact) >= 0.9999
        bar = max(GRADIENT_BAR[case.dtype], 1.5 * relative_l2(yardstick, exact))
        assert relative_l2(grad, exact) <= bar, (tolerable, relative_l2(grad, exact), bar)


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

CASES = [
    Case(1, BF16, batch=2),
    Case(63, FP16, layout="fused"),
    Case(64, BF16, (64, 64), batch=3),
    Case(65, FP32, (64, 64), layout="bhsd"),
    Case(203, BF16, batch=2, layout="fused", head_dim=128, value_dim=128),
    Case(203, BF16, (64, 64), unaligned=True, masked=True, batch=2),
    Case(203, FP16, unaligned=True, head_dim=128, value_dim=128, heads=1),
    Case(203, FP32, head_dim=16, value_dim=16),
    Case(257, FP16, masked=True, batch=3, heads=1),
    Case(257, BF16, text_blocks=1, permille=200),
    Case(258, BF16, (64, 64), text_blocks=2, permille=200, unaligned=True, masked=True, batch=2, heads=1),
    Case(300, BF16, head_dim=80, value_dim=80, layout="fused"),
    Case(300, FP16, head_dim=96, value_dim=96, heads=1),
    Case(190, FP32, head_dim=40, value_dim=24, heads=1),
    Case(320, BF16, (128, 64), permille=30, scale=4.0),
    Case(333, BF16, (128, 64), scale=16.0),
    Case(333, FP16, (64, 64), scale=16.0, heads=1),
    Case(333, FP32, (64, 64), scale=16.0, heads=1),
    Case(150, BF16, (64, 128), heads=1),
    Case(150, BF16, (32, 16), heads=1),
    Case(150, FP16, (16, 32), heads=1, unaligned=True),
    Case(700, BF16, (256, 128), heads=1, permille=1000),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_definition(case: Case, device: str) -> None:
    check(case, device)


def draw(seed: int) -> Case:
    """A random case; longer and more of them where a GPU runs them."""
    rng = random.Random(seed)
    head_dim = rng.choice((64, 80, 96, 128))
    blocks = rng.choice(((128, 64), (64, 64)))
    longest = 3 * blocks[0] if interpreting() else 2000
    tokens = rng.randint(1, longest)
    return Case(
        tokens=tokens,
        dtype=rng.choice((BF16, BF16, FP16, FP32)),
        blocks=blocks,
        batch=rng.randint(1, 1 if interpreting() else 3),
        heads=rng.randint(1, 2 if interpreting() else 4),
        head_dim=head_dim,
        value_dim=head_dim,
        layout=rng.choice(LAYOUTS),
        scale=rng.choice((1.0, 4.0, 16.0)),
        permille=rng.choice((1000, 500, 200, 100, 30)),
        unaligned=rng.random() < 0.4,
        masked=rng.random() < 0.4,
        text_blocks=rng.choice((0, 0, 1)),
        seed=seed,
    )


@pytest.mark.parametrize("seed", range(8 if interpreting() else 60))
def test_random_cases(seed: int, device: str) -> None:
    check(draw(seed), device)


def test_sparsity_zero_equals_sdpa(device: str) -> None:
    case = Case(203 if interpreting() else 3333, BF16, permille=1000)
    inputs = Inputs.of(case).to(device)
    out, *_ = inputs.run(case)
    exact = F.scaled_dot_product_attention(*(x.double() for x in inputs.qkv))
    theirs = F.scaled_dot_product_attention(*inputs.qkv)
    assert relative_l2(out, exact) <= 1.5 * relative_l2(theirs, exact)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("head_dim", [64, 20])
def test_a_list_longer_than_the_sequence_reads_nothing_else(head_dim: int, masked: bool, device: str) -> None:
    """Two entries where there is one short block; head_dim 20 is gathered, 64 read through descriptors."""
    query, key, value = (torch.randn(1, 1, 40, head_dim).to(BF16).to(device) for _ in range(3))
    lut = torch.tensor([0, 0], dtype=torch.int32, device=device).view(1, 1, 1, 2)
    count = torch.full((1, 1, 1), 2, dtype=torch.int32, device=device)
    key_mask = torch.ones(1, 40, dtype=torch.bool, device=device) if masked else None
    selection = Selection(lut, count, 64, 64, 0.1, key_mask)
    out, lse = host.block_sparse_attention(query, key, value, selection)
    grads = host.block_sparse_attention_backward(torch.ones_like(out), query, key, value, out, lse, selection)
    with pytest.raises(KernelArgumentError, match="ascending"):
        raise_pending(query.device, wait=True)
    exact = F.scaled_dot_product_attention(*(x.double() for x in (query, key, value)), scale=0.1)
    assert relative_l2(out, exact) <= FORWARD_BAR[BF16]  # the second entry is beyond the last full block: not read
    assert all(torch.isfinite(grad).all() for grad in grads)


def test_two_runs_are_bitwise_equal(device: str) -> None:
    case = Case(203 if interpreting() else 2500, BF16, permille=500, text_blocks=1)
    inputs = Inputs.of(case).to(device)
    for first, second in zip(inputs.run(case), inputs.run(case), strict=True):
        assert torch.equal(first, second)


def test_rows_without_keys_give_zero(device: str) -> None:
    case = Case(203, BF16, (64, 64), permille=600)
    inputs = Inputs.of(case).to(device)
    inputs.count[:, :, 1] = 0
    inputs.count[:, :, 2] = 1
    out, lse, *grads = inputs.run(case)
    assert (out[:, :, 64:128] == 0).all()
    assert torch.isinf(lse[:, :, 64:128]).all()
    assert (grads[0][:, :, 64:128] == 0).all()
    for ours, exact in zip((out, *grads), (x for i, x in enumerate(inputs.expected(case)) if i != 1), strict=True):
        assert relative_l2(ours, exact) <= 1e-2


def test_keys_that_are_all_masked_give_zero(device: str) -> None:
    case = Case(130, BF16, (64, 64), batch=2, masked=True)
    inputs = Inputs.of(case).to(device)
    assert inputs.key_mask is not None
    inputs.key_mask[0] = False
    out, _, *grads = inputs.run(case)
    assert (out[0] == 0).all()
    assert (out[1].abs().sum(-1) > 0).all()
    for grad in grads:
        assert (grad[0] == 0).all()
        assert grad[1].abs().sum() > 0


def test_expanded_gradients_and_negative_scale(device: str) -> None:
    qkv = [x.to(device).requires_grad_() for x in make_qkv(130, dtype=FP32, head_dim=16)]
    lut, count = (x.to(device) for x in make_selection(qkv[0].cpu(), qkv[1].cpu(), 64, 64))
    wide = [x.detach().cpu().double().requires_grad_() for x in qkv]
    for scale in (0.25, -0.25):
        out, _ = block_sparse_attention(*qkv, lut, count, 64, 64, scale)
        exact, _ = reference.block_sparse_attention(*wide, Selection(lut.cpu(), count.cpu(), 64, 64, scale))
        ours = torch.autograd.grad(out.sum(), qkv)  # the gradient of a sum has stride 0
        for grad, theirs in zip(ours, torch.autograd.grad(exact.sum(), wide), strict=True):
            torch.testing.assert_close(grad.cpu().double(), theirs, rtol=1e-3, atol=1e-4)


def test_a_transposed_head_dim(device: str) -> None:
    """The channels need not be contiguous."""
    qkv = [x.transpose(2, 3).contiguous().transpose(2, 3).to(device) for x in make_qkv(100, dtype=FP32, head_dim=16)]
    lut, count = make_selection(qkv[0].cpu(), qkv[1].cpu(), 64, 64)
    out, _ = block_sparse_attention(*qkv, lut.to(device), count.to(device), 64, 64, 0.25)
    expected, _ = reference.block_sparse_attention(
        *(x.cpu().double() for x in qkv), Selection(lut, count, 64, 64, 0.25)
    )
    assert relative_l2(out.cpu(), expected) <= 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float64}, "float64.*bfloat16, float16, float32.*use_engine"),
        ({"head_dim": 136}, "head_dim 136"),
    ],
)
def test_unsupported_arguments_say_what_is_supported(change: dict[str, object], message: str, device: str) -> None:
    arguments = {"dtype": FP32, "head_dim": 16, "blocks": (64, 64)} | change
    blocks: tuple[int, int] = arguments["blocks"]  # type: ignore[assignment]
    qkv = make_qkv(100, dtype=arguments["dtype"], head_dim=arguments["head_dim"])  # type: ignore[arg-type]
    lut, count = make_selection(qkv[0], qkv[1], *blocks)
    with pytest.raises(UnsupportedKernelError, match=message):
        block_sparse_attention(*(x.to(device) for x in qkv), lut.to(device), count.to(device), *blocks, 0.25)


def test_every_element_is_written(device: str) -> None:
    case = Case(203, BF16, (64, 64), batch=2, text_blocks=1)
    inputs = Inputs.of(case).to(device)
    results = inputs.run(case)
    assert all(torch.isfinite(x).all() for x in results)


def test_the_inverted_index(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    shape, key_blocks = (2, 3, 37), 70
    chosen = torch.rand(*shape, key_blocks, generator=generator) < 0.3
    chosen[:, :, :, 5] = False  # a key block that nobody lists
    count = chosen.sum(-1).int()
    count[0, 1, 4] = count[1, 2, 0] = ALL_BLOCKS
    lut = torch.argsort(chosen.int(), dim=-1, descending=True, stable=True).int()[..., : int(count.max())].contiguous()
    index = invert(lut.to(device), count.to(device), key_blocks)
    rows, start = index.rows.cpu(), index.start.cpu()
    for group in range(6):
        b, h = divmod(group, 3)
        dense = (count[b, h] == ALL_BLOCKS).nonzero()[:, 0].tolist()
        for j in range(key_blocks + 1):
            run = rows[group, start[group, j] : start[group, j + 1]].tolist()
            listing = [i for i in range(37) if i not in dense and chosen[b, h, i, j]] if j < key_blocks else dense
            assert run == listing


@pytest.mark.parametrize(
    ("name", "where", "entry", "message"),
    [
        ("lut", (0, 1, 1, 0), 99, "lut has entries outside"),
        ("lut", (0, 0, 0, 0), -5, "lut has entries outside"),
        ("lut", (0, 0, 2), 1, "ascending"),
        ("count", (0, 1, 0), 9, "count has entries outside"),
        ("count", (0, 1, 0), -2, "count has entries outside"),
    ],
)
@pytest.mark.parametrize("at_once", [False, True])
def test_wrong_contents_are_reported_and_harmless(
    name: str,
    where: tuple[int, ...],
    entry: int,
    message: str,
    at_once: bool,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever the lists say, the kernels stay within their tensors; the error comes with the call or with the next."""
    case = Case(203, BF16, (64, 64), permille=600, masked=at_once)
    inputs = Inputs.of(case)
    getattr(inputs, name)[where] = entry
    qkv = [x.to(device) for x in inputs.qkv]
    lut, count = inputs.lut.to(device), inputs.count.to(device)
    key_mask = None if inputs.key_mask is None else inputs.key_mask.to(device)
    selection = Selection(lut, count, *case.blocks, 0.125, key_mask)
    if at_once:
        monkeypatch.setenv("SALAD_CHECK_INDICES", "1")
        with pytest.raises(KernelArgumentError, match=message):
            host.block_sparse_attention(*qkv, selection)
        return
    out, lse = host.block_sparse_attention(*qkv, selection)
    host.block_sparse_attention_backward(torch.ones_like(out), *qkv, out, lse, selection)
    with pytest.raises(KernelArgumentError, match=message):
        raise_pending(qkv[0].device, wait=True)
    raise_pending(qkv[0].device, wait=True)  # said once
