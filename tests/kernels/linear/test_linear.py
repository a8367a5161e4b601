"""salad::linear_state and salad::linear_output against their definition (method.md sections 5 and 12)."""

import pytest
import torch
from salad_compile.kernels import KernelArgumentError, linear_output, linear_state
from salad_compile.kernels.linear import cpu, reference

from ..helpers import FORWARD_BAR, LAYOUTS, LENGTHS, cosine, make_qkv, relative_l2

EPS = 1e-6
MAPS = ("relu", "elu", "softmax")


def linear_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, feature_map: str) -> torch.Tensor:
    return linear_output(query, *linear_state(key, value, feature_map), feature_map, EPS)


@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", LENGTHS)
def test_equals_the_quadratic_sum(tokens: int, layout: str, feature_map: str) -> None:
    qkv = make_qkv(tokens, layout, grad=True)
    out = linear_attention(*qkv, feature_map)
    expected = reference.quadratic_attention(*qkv, feature_map, EPS)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    grad = torch.randn_like(out)
    for ours, theirs in zip(torch.autograd.grad(out, qkv, grad), torch.autograd.grad(expected, qkv, grad), strict=True):
        # a single token that barely fires divides by a tiny sum, so gradients reach 1e3 and more
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("feature_map", MAPS)
def test_each_operator_equals_its_reference(feature_map: str) -> None:
    query, key, value = make_qkv(203)
    value = value[..., :5]  # value width differs from head_dim
    state, key_sum = linear_state(key, value, feature_map)
    expected_state, expected_sum = reference.linear_state(key, value, feature_map)
    torch.testing.assert_close(state, expected_state)
    torch.testing.assert_close(key_sum, expected_sum)
    out = linear_output(query, state, key_sum, feature_map, 0.5)
    torch.testing.assert_close(out, reference.linear_output(query, state, key_sum, feature_map, 0.5))
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_narrow_dtypes_within_the_bars(dtype: torch.dtype, feature_map: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_CHUNK_ELEMENTS", 1 << 14)  # several chunks, and a short one at the end
    qkv = make_qkv(600, dtype=dtype, head_dim=64, grad=True)
    wide = [x.detach().double().requires_grad_() for x in qkv]
    out, expected = linear_attention(*qkv, feature_map), reference.quadratic_attention(*wide, feature_map, EPS)
    assert relative_l2(out, expected) <= FORWARD_BAR[dtype]
    grad = torch.randn_like(out)
    ours = torch.autograd.grad(out, qkv, grad)
    theirs = torch.autograd.grad(expected, wide, grad.double())
    for narrow, exact in zip(ours, theirs, strict=True):
        assert narrow.dtype == dtype
        assert cosine(narrow, exact) >= 0.9999
        assert relative_l2(narrow, exact) <= 1e-2


def test_fp16_sums_do_not_overflow() -> None:
    _, key, value = (x.abs() * 30 for x in make_qkv(4096, dtype=torch.float16, batch=1, heads=1))
    state, key_sum = linear_state(key, value, "relu")
    assert state.max() > 65_504  # beyond fp16
    assert torch.isfinite(state).all()
    assert torch.isfinite(key_sum).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_without_features_give_zero(dtype: torch.dtype) -> None:
    query, key, value = make_qkv(113, dtype=dtype, grad=True)
    dead = query.detach().clone()
    dead[:, :, 10:20] = -dead[:, :, 10:20].abs()
    dead.requires_grad_()
    out = linear_attention(dead, key, value, "relu")
    assert (out[:, :, 10:20] == 0).all()
    assert (out[:, :, :10].abs().sum(-1) > 0).all()
    (grad,) = torch.autograd.grad(out.float().square().sum() + out.sum(), dead)
    assert torch.isfinite(grad).all()
    assert (grad[:, :, 10:20] == 0).all()


def test_relu_derivative_is_zero_at_zero() -> None:
    query, key, value = make_qkv(8)
    zeroed = query.clone()
    zeroed[..., 0] = 0
    zeroed.requires_grad_()
    (grad,) = torch.autograd.grad(linear_attention(zeroed, key, value, "relu").sum(), zeroed)
    assert (grad[..., 0] == 0).all()
    assert grad[..., 1:].abs().max() > 0


@pytest.mark.parametrize("feature_map", MAPS)
def test_gradcheck(feature_map: str) -> None:
    qkv = make_qkv(7, batch=1, heads=2, head_dim=4, grad=True)
    assert torch.autograd.gradcheck(lambda *x: linear_attention(*x, feature_map), qkv)


def test_expanded_gradients() -> None:
    qkv = make_qkv(65, grad=True)
    out = linear_attention(*qkv, "relu")
    expanded = torch.autograd.grad(out.sum(), qkv)  # the gradient of a sum has stride 0
    dense = torch.autograd.grad(linear_attention(*qkv, "relu"), qkv, torch.ones_like(out))
    for ours, theirs in zip(expanded, dense, strict=True):
        assert torch.equal(ours, theirs)
    state, key_sum = linear_state(qkv[1], qkv[2], "relu")
    (grad,) = torch.autograd.grad(state.sum() + key_sum.sum(), qkv[2])
    features = qkv[1].detach().relu()
    torch.testing.assert_close(grad, features.sum(-1, keepdim=True).expand_as(grad))


def test_two_runs_are_bitwise_equal() -> None:
    qkv = make_qkv(1023, dtype=torch.float32, grad=True)

    def run() -> list[torch.Tensor]:
        out = linear_attention(*qkv, "relu")
        return [out, *torch.autograd.grad(out, qkv, torch.ones_like(out) * 0.3)]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def test_unknown_feature_map_lists_the_known() -> None:
    _, key, value = make_qkv(4)
    with pytest.raises(KernelArgumentError, match=r"'gelu'.*elu.*relu.*softmax"):
        linear_state(key, value, "gelu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key_sum": torch.randn(2, 3, 8, dtype=torch.float64)}, "key_sum"),
        ({"state": torch.randn(2, 3, 16, 16)}, "float64"),
        ({"state": torch.randn(3, 16, 16, dtype=torch.float64)}, "4 dimensions"),
        ({"eps": 0.0}, "positive"),
    ],
)
def test_output_rejects(change: dict[str, object], message: str) -> None:
    query, key, value = make_qkv(9)
    state, key_sum = linear_state(key, value, "relu")
    arguments = {"query": query, "state": state, "key_sum": key_sum, "feature_map": "relu", "eps": EPS}
    with pytest.raises(KernelArgumentError, match=message):
        linear_output(**(arguments | change))  # type: ignore[arg-type]


def test_state_rejects() -> None:
    _, key, value = make_qkv(9)
    with pytest.raises(KernelArgumentError, match="agree in batch, heads and tokens"):
        linear_state(key, value[:, :, :8], "relu")
    with pytest.raises(KernelArgumentError, match="one dtype"):
        linear_state(key, value.float(), "relu")
