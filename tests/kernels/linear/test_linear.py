"""salad::linear_state and salad::linear_output against their definition (specification 5 and 12)."""

import pytest
import torch

from salad_compile.kernels import KernelArgumentError, linear_output, linear_state
from salad_compile.kernels.linear import reference
from salad_compile.kernels.linear import torch as engine
from salad_compile.kernels.linear_operands import Keys, Queries
from tests.kernels.helpers import FORWARD_BAR, LAYOUTS, LENGTHS, cosine, make_qkv, quadratic_attention, relative_l2

pytestmark = pytest.mark.usefixtures("poisoned_memory")

EPS = 1e-6
MAPS = ("relu", "elu", "softmax")


def linear_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    feature_map: str,
    key_mask: torch.Tensor | None = None,
    rotated_query: torch.Tensor | None = None,
    rotated_key: torch.Tensor | None = None,
) -> torch.Tensor:
    state = linear_state(key, value, feature_map, key_mask, rotated_key)
    return linear_output(query, *state, feature_map, EPS, rotated_query)


def make_mask(batch: int, tokens: int) -> torch.Tensor:
    mask = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(7)) < 0.6
    mask[:, 0] = True
    return mask


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Rotary position encoding in its plainest form: pairs of channels turn with the token's index."""
    tokens, half = x.shape[2], x.shape[3] // 2
    angles = torch.arange(tokens, dtype=x.dtype)[:, None] * torch.linspace(1, 0.01, half, dtype=x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angles.cos() - second * angles.sin(), first * angles.sin() + second * angles.cos()], -1)


@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", LENGTHS)
def test_equals_the_quadratic_sum(tokens: int, layout: str, feature_map: str) -> None:
    qkv = make_qkv(tokens, layout, grad=True)
    out = linear_attention(*qkv, feature_map)
    expected = quadratic_attention(*qkv, feature_map, EPS)
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
    expected_state, expected_sum = reference.linear_state(Keys(key, value, feature_map))
    torch.testing.assert_close(state, expected_state)
    torch.testing.assert_close(key_sum, expected_sum)
    out = linear_output(query, state, key_sum, feature_map, 0.5)
    torch.testing.assert_close(out, reference.linear_output(Queries(query, state, key_sum, feature_map, 0.5)))
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_narrow_dtypes_within_the_bars(dtype: torch.dtype, feature_map: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_CHUNK_ELEMENTS", 1 << 14)  # several chunks, and a short one at the end
    qkv = make_qkv(600, dtype=dtype, head_dim=64, grad=True)
    wide = [x.detach().double().requires_grad_() for x in qkv]
    out, expected = linear_attention(*qkv, feature_map), quadratic_attention(*wide, feature_map, EPS)
    assert relative_l2(out, expected) <= FORWARD_BAR[dtype]
    grad = torch.randn_like(out)
    ours = torch.autograd.grad(out, qkv, grad)
    theirs = torch.autograd.grad(expected, wide, grad.double())
    for narrow, exact in zip(ours, theirs, strict=True):
        assert narrow.dtype == dtype
        assert cosine(narrow, exact) >= 0.9999
        assert relative_l2(narrow, exact) <= 1e-2


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize("tokens", [65, 203])
def test_masked_and_rotated_equal_the_quadratic_sum(
    tokens: int, feature_map: str, masked: bool, rotated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_CHUNK_ELEMENTS", 1 << 12)  # several chunks
    leaves = list(make_qkv(tokens, "fused", grad=True))
    mask = make_mask(2, tokens) if masked else None
    if rotated:
        leaves += [rotate(x.detach().relu()).requires_grad_() for x in leaves[:2]]
    out = linear_attention(*leaves[:3], feature_map, mask, *leaves[3:])
    expected = quadratic_attention(*leaves[:3], feature_map, EPS, mask, *leaves[3:])
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    grad = torch.randn_like(out)
    for ours, theirs in zip(
        torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)
    if mask is not None:
        rows = ~mask[:, None, :, None].expand_as(leaves[1])
        grads = torch.autograd.grad(linear_attention(*leaves[:3], feature_map, mask, *leaves[3:]), leaves, grad)
        assert all((grads[index][rows] == 0).all() for index in ([1, 2, 4] if rotated else [1, 2]))


@pytest.mark.parametrize("feature_map", MAPS)
def test_masked_tokens_may_as_well_be_absent(feature_map: str) -> None:
    _, key, value = make_qkv(100)
    mask = torch.arange(100).expand(2, 100) < 77
    value = value.masked_fill(~mask[:, None, :, None], float("nan"))
    masked = linear_state(key, value, feature_map, mask)
    short = linear_state(key[:, :, :77], value[:, :, :77], feature_map)
    for ours, theirs in zip(masked, short, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_identity_is_a_rotation() -> None:
    query, key, value = make_qkv(113, grad=True)
    turned = query.relu(), key.relu()
    out = linear_attention(query, key, value, "relu", None, *turned)
    expected = linear_attention(query, key, value, "relu")
    torch.testing.assert_close(out, expected)
    # the gradient reaches query and key through both places
    grad = torch.randn_like(out)
    leaves = (query, key, value)
    for ours, theirs in zip(
        torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_map_then_rotate_depends_on_relative_position_alone() -> None:
    query, key, value = (x[:1, :1] for x in make_qkv(40))
    query, key = query[:, :, :1].expand(-1, -1, 40, -1), key[:, :, :1].expand(-1, -1, 40, -1)
    value = torch.eye(40, dtype=value.dtype)[None, None]  # the output is then the matrix of weights
    weights = linear_attention(query, key, value, "relu", None, rotate(query.relu()), rotate(key.relu()))[0, 0]
    for shift in range(-39, 40):
        diagonal = weights.diagonal(shift)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert weights.std() > 1e-3


def test_rotated_dead_rows_follow_the_formula() -> None:
    query, key, value = make_qkv(9)
    state, key_sum = linear_state(key, value, "relu", None, rotate(key.relu()))
    out = linear_output(-query.abs(), state, key_sum, "relu", 0.5, query)
    torch.testing.assert_close(out, query @ state / 0.5)


@pytest.mark.parametrize("feature_map", MAPS)
def test_gradcheck_masked_and_rotated(feature_map: str) -> None:
    leaves = [*make_qkv(7, batch=2, heads=1, head_dim=4, grad=True)]
    leaves += make_qkv(7, batch=2, heads=1, head_dim=4, seed=1, grad=True)[:2]
    mask = make_mask(2, 7)
    assert torch.autograd.gradcheck(lambda q, k, v, *r: linear_attention(q, k, v, feature_map, mask, *r), leaves)
    assert torch.autograd.gradcheck(lambda *x: linear_attention(*x, feature_map, mask), leaves[:3])


def test_absent_gradients_are_empty() -> None:
    query, key, value = make_qkv(9)
    state, key_sum = linear_state(key, value, "relu")
    ops = torch.ops.salad
    assert ops.linear_state_backward(state, key_sum, key, value, "relu")[2].shape == (0,)
    assert ops.linear_output_backward(value, query, state, key_sum, "relu", EPS)[3].shape == (0,)
    assert ops.linear_state_backward(state, key_sum, key, value, "relu", None, key)[2].shape == key.shape
    assert ops.linear_output_backward(value, query, state, key_sum, "relu", EPS, query)[3].shape == query.shape


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
        ({"rotated_query": torch.randn(2, 3, 8, 16, dtype=torch.float64)}, "rotated_query must have the shape"),
        ({"rotated_query": torch.randn(2, 3, 9, 16)}, "rotated_query has dtype"),
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
    with pytest.raises(KernelArgumentError, match="key_mask must be bool"):
        linear_state(key, value, "relu", torch.ones(2, 9))
    with pytest.raises(KernelArgumentError, match=r"key_mask must be \(B, S\)"):
        linear_state(key, value, "relu", torch.ones(2, 8, dtype=torch.bool))
    with pytest.raises(KernelArgumentError, match="rotated_key must have the shape"):
        linear_state(key, value, "relu", None, key[..., :8])
