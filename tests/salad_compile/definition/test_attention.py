"""The definition, against formulas written out in float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from salad_compile.config import SaladConfig
from salad_compile.definition import branch_tensors
from salad_compile.definition.attention import salad_attention, sparse_attention
from salad_compile.definition.linear_branch import LINEAR_EPS, linear_attention
from salad_compile.definition.operands import Mapped
from salad_compile.definition.spec import AttentionSpec
from salad_compile.definition.token_layout import Segments
from salad_compile.grid.orders import order_and_inverse, temporal_order
from salad_compile.kernels.linear.feature_maps import find_feature_map
from tests.support import relative_error, seeded

B, H, S, D, C = 2, 3, 77, 8, 20


def spec(sparsity: float) -> AttentionSpec:
    return SaladConfig(compensation="none", sparsity=sparsity, query_block=32, key_block=16).spec


def operands(scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Tensor]]:
    with seeded(3):
        q, k, v = torch.randn(3, B, S, H, D, dtype=torch.float64).transpose(2, 3).unbind(0)
        x = torch.randn(B, S, C, dtype=torch.float64)
        shapes = {"gate_weight": (C,), "gate_bias": (1,), "proj_weight": (H * D, H * D), "proj_bias": (H * D,)}
        branch = {name: torch.randn(shape, dtype=torch.float64) * 0.3 for name, shape in shapes.items()}
    return q * scale, k * scale, v, x, branch


def salad(*arguments: object, sparsity: float = 0.5, dtype: torch.dtype = torch.float64) -> Tensor:
    q, k, v, x, branch = arguments
    return salad_attention(q, k, v, x, branch, None, spec(sparsity), scale=D**-0.5, dtype=dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", [1.0, 4.0, 16.0])
def test_the_sum_of_the_paper(scale: float) -> None:
    """O' = O_s + sigmoid(x w + b) Proj(O_l), with O_l as the naive sum over all pairs."""
    q, k, v, x, branch = operands(scale)
    weights = q.relu() @ k.relu().transpose(-1, -2)
    linear = weights @ v / (weights.sum(-1, keepdim=True) + LINEAR_EPS)
    projected = linear.transpose(1, 2).flatten(2) @ branch["proj_weight"].T + branch["proj_bias"]
    gate = 1 / (1 + torch.exp(-(x @ branch["gate_weight"] + branch["gate_bias"])))
    update = (gate.unsqueeze(-1) * projected).unflatten(-1, (H, D)).transpose(1, 2)
    expected = sparse_attention(q, k, v, Segments(0, 0, 0, S), spec(0.5), D**-0.5) + update
    assert relative_error(salad(q, k, v, x, branch), expected) < 1e-12


def test_invariants_of_the_specification() -> None:
    q, k, v, x, branch = operands()
    zero = branch | {name: branch[name] * 0 for name in ("proj_weight", "proj_bias")}
    assert torch.equal(salad(q, k, v, x, zero), sparse_attention(q, k, v, Segments(0, 0, 0, S), spec(0.5), D**-0.5))
    assert relative_error(salad(q, k, v, x, zero, sparsity=0.0), F.scaled_dot_product_attention(q, k, v)) < 1e-12


def test_an_unbatched_gate_input_is_one_sample() -> None:
    q, k, v, x, branch = operands()
    q, k, v = q[:1], k[:1], v[:1]
    assert torch.equal(salad(q, k, v, x[0], branch), salad(q, k, v, x[:1], branch))


def test_the_result_has_the_dtype_of_what_it_replaces() -> None:
    """SanaWM feeds 16-bit query, key and value beside an fp32 layer input and fp32 parameters."""
    q, k, v, x, branch = operands()
    exact = salad(q, k, v, x, branch, sparsity=0.0)
    half = [t.to(torch.bfloat16) for t in (q, k, v)]
    single = {name: t.float() for name, t in branch.items()}
    out = salad(*half, x.float(), single, sparsity=0.0, dtype=torch.bfloat16)
    assert out.dtype == torch.bfloat16
    assert relative_error(out, exact) < 2e-2


def test_gradients_reach_everything() -> None:
    q, k, v, x, branch = operands()
    leaves = [t.clone().requires_grad_() for t in (q, k, v, x, *branch.values())]
    salad(*leaves[:4], dict(zip(branch, leaves[4:], strict=True))).square().sum().backward()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() and leaf.grad.norm() > 0 for leaf in leaves)


def test_gradcheck() -> None:
    """At sparsity 0: a selection that flips under the finite differences would not be differentiable."""
    q, k, v, x, branch = operands()
    small = [t[:1, :, :35].detach() for t in (q, k, v)] + [x[:1, :35], *branch.values()]
    leaves = [t.clone().requires_grad_() for t in small]
    assert torch.autograd.gradcheck(
        lambda *t: salad(*t[:4], dict(zip(branch, t[4:], strict=True)), sparsity=0.0), leaves, fast_mode=True
    )


# --- variants: scaling, gates, patterns -------------------------------------------------------------------------------


def variant(**settings: Any) -> AttentionSpec:
    return SaladConfig(**{"compensation": "none", "sparsity": 0.5, "query_block": 32, "key_block": 16, **settings}).spec


def call(given: tuple[Any, ...], spec: AttentionSpec, order: Tensor | None = None) -> Tensor:
    q, k, v, x, branch = given
    return salad_attention(q, k, v, x, branch, order, spec, scale=D**-0.5, dtype=torch.float64)


def scales(seed: int = 5) -> dict[str, Tensor]:
    with seeded(seed):
        return {
            "layer_scale": torch.randn((), dtype=torch.float64),
            "head_scale": torch.randn(H, dtype=torch.float64),
        }


def test_v2_with_unit_scales_is_v1() -> None:
    q, k, v, x, branch = operands()
    ones = {name: torch.ones_like(scale) for name, scale in scales().items()}
    v1 = call((q, k, v, x, branch), variant())
    assert torch.equal(call((q, k, v, x, branch | ones), variant(scaling="v2")), v1)
    assert relative_error(call((q, k, v, x, branch | scales()), variant(scaling="v2")), v1) > 1e-2


def test_v2_by_hand() -> None:
    """specification 3: O' = O_s + s_layer G Proj(s_head O_l)."""
    q, k, v, x, branch = operands()
    branch = branch | scales()
    sparse = sparse_attention(q, k, v, Segments(0, 0, 0, S), variant(), D**-0.5)
    linear = linear_attention(q, k, v, variant()) * branch["head_scale"][:, None, None]
    projected = linear.transpose(1, 2).flatten(2) @ branch["proj_weight"].T + branch["proj_bias"]
    gate = torch.sigmoid(x @ branch["gate_weight"] + branch["gate_bias"]).unsqueeze(-1)
    update = (branch["layer_scale"] * gate * projected).unflatten(-1, (H, D)).transpose(1, 2)
    assert relative_error(call((q, k, v, x, branch), variant(scaling="v2")), sparse + update) < 1e-12


def test_one_gate_per_head_by_hand() -> None:
    q, k, v, x, branch = operands()
    with seeded(6):
        gates = {"gate_weight": torch.randn(C, H, dtype=torch.float64), "gate_bias": torch.randn(H).double()}
        branch = branch | gates
    sparse = sparse_attention(q, k, v, Segments(0, 0, 0, S), variant(), D**-0.5)
    linear = linear_attention(q, k, v, variant()).transpose(1, 2).flatten(2)
    projected = (linear @ branch["proj_weight"].T + branch["proj_bias"]).unflatten(-1, (H, D))
    gate = torch.sigmoid(x @ branch["gate_weight"] + branch["gate_bias"]).unsqueeze(-1)
    expected = sparse + (gate * projected).transpose(1, 2)
    assert relative_error(call((q, k, v, x, branch), variant(gate="head")), expected) < 1e-12


def test_no_gate_is_a_gate_of_one_and_no_branch_is_no_update() -> None:
    q, k, v, x, branch = operands()
    wide_open = branch | {"gate_weight": branch["gate_weight"] * 0, "gate_bias": branch["gate_bias"] * 0 + 1e3}
    bare = {name: tensor for name, tensor in branch.items() if not name.startswith("gate_")}
    assert torch.equal(call((q, k, v, x, bare), variant(gate="none")), call((q, k, v, x, wide_open), variant()))
    sparse = sparse_attention(q, k, v, Segments(0, 0, 0, S), variant(), D**-0.5)
    assert torch.equal(call((q, k, v, x, {}), variant(linear_branch=False)), sparse)


def test_windows_by_hand() -> None:
    """Each head by a mask over all pairs of tokens: even ones in the native order, odd ones through time."""
    q, k, v, x, branch = operands()
    grid = (7, 1, 11)
    order = order_and_inverse(temporal_order, grid)
    through_time = torch.tensor([False, True, True])
    given = (q, k, v, x, branch | {"temporal_heads": through_time})
    spec = variant(pattern="stswa", window=20)
    at = torch.arange(S)
    places = {False: at, True: order[1].long()}  # where a token stands in the order of the windows
    sparse = torch.empty_like(v)
    for head, temporal in enumerate(through_time.tolist()):
        centre = (places[temporal] // 32 + 0.5) * 32
        near = ((places[temporal] // 16 + 0.5) * 16 - centre[:, None]).abs() <= 20
        near |= places[temporal] // 32 == (places[temporal] // 32)[:, None]  # blocks that overlap
        sparse[:, head] = F.scaled_dot_product_attention(q[:, head], k[:, head], v[:, head], attn_mask=near)
    linear = linear_attention(q, k, v, spec).transpose(1, 2).flatten(2)
    gate = torch.sigmoid(x @ branch["gate_weight"] + branch["gate_bias"]).unsqueeze(-1)
    update = (gate * (linear @ branch["proj_weight"].T + branch["proj_bias"])).unflatten(-1, (H, D)).transpose(1, 2)
    assert relative_error(call(given, spec, order), sparse + update) < 1e-12


@pytest.mark.parametrize("pattern", ["topk", "stswa"])
def test_the_sparsity_is_data(pattern: str) -> None:
    given = operands()
    order = order_and_inverse(temporal_order, (7, 1, 11))
    heads = {"temporal_heads": torch.tensor([False, True, True])} if pattern == "stswa" else {}
    adjustable = variant(pattern=pattern, sparsity=0.8, lowest_sparsity=0.1)
    for permille in (100, 400, 900):
        branch = given[4] | {"permille": torch.tensor(permille, dtype=torch.int32)} | heads
        fixed = variant(pattern=pattern, sparsity=1 - permille / 1000)
        out = call((*given[:4], branch), adjustable, order)
        assert relative_error(out, call((*given[:4], given[4] | heads), fixed, order)) < 1e-12


@pytest.mark.parametrize(
    "settings", [{"scaling": "v2", "gate": "head"}, {"pattern": "stswa", "scaling": "v2"}, {"gate": "none"}], ids=str
)
def test_gradients_of_the_variants(settings: dict[str, Any]) -> None:
    """At sparsity 0, where no selection can flip, against finite differences, and none of them vanishes."""
    spec = variant(**settings, sparsity=0.0)
    q, k, v, x, branch = operands()
    tokens = 35
    tensors = {**branch, **scales()}
    with seeded(6):
        if spec.gate == "head":
            tensors |= {"gate_weight": torch.randn(C, H).double(), "gate_bias": torch.randn(H).double()}
    names = [name for name in branch_tensors.names(spec) if name != "temporal_heads"]
    fixed = {"temporal_heads": torch.tensor([True, False, True])} if spec.pattern == "stswa" else {}
    order = order_and_inverse(temporal_order, (5, 1, 7))
    small = [t[:1, :, :tokens] for t in (q, k, v)] + [x[:1, :tokens], *(tensors[name] for name in names)]
    leaves = [t.detach().clone().requires_grad_() for t in small]

    def run(*t: Tensor) -> Tensor:
        return call((*t[:4], dict(zip(names, t[4:], strict=True)) | fixed), spec, order)

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    grads = torch.autograd.grad(run(*leaves).square().sum(), leaves, allow_unused=spec.gate == "none")
    assert all(float(grad.norm()) > 0 for i, grad in enumerate(grads) if i != 3 or spec.gate != "none")


# --- map-then-rotate --------------------------------------------------------------------------------------------------


def turned(x: Tensor) -> Tensor:
    """Some linear map of each token, which differs between tokens."""
    return x * torch.linspace(-1, 1, x.shape[2], dtype=x.dtype)[:, None] + x.flip(-1)


def test_map_then_rotate_by_hand() -> None:
    q, k, v, x, branch = operands()
    before = q.flip(2), k * 0.7
    mapped = Mapped(*before, *(turned(t.relu()) for t in before))
    numerators = mapped.rotated_query @ mapped.rotated_key.transpose(-1, -2)
    sums = (before[0].relu() @ before[1].relu().transpose(-1, -2)).sum(-1, keepdim=True)
    linear = (numerators @ v / (sums + LINEAR_EPS)).transpose(1, 2).flatten(2)
    gate = torch.sigmoid(x @ branch["gate_weight"] + branch["gate_bias"]).unsqueeze(-1)
    update = (gate * (linear @ branch["proj_weight"].T + branch["proj_bias"])).unflatten(-1, (H, D)).transpose(1, 2)
    spec = variant(rope_placement="map-then-rotate")
    out = salad_attention(q, k, v, x, branch, None, spec, scale=D**-0.5, dtype=torch.float64, mapped=mapped)
    expected = sparse_attention(q, k, v, Segments(0, 0, 0, S), spec, D**-0.5) + update
    assert relative_error(out, expected) < 1e-12


@pytest.mark.parametrize("pattern", ["topk", "stswa"])
@pytest.mark.parametrize("text", ["none", "before", "after", "prefix"])
@pytest.mark.parametrize("settings", [{}, {"scaling": "v2"}, {"feature_map": "softmax"}], ids=str)
def test_map_then_rotate_without_a_turn_is_rotate_then_map(pattern: str, text: str, settings: dict[str, Any]) -> None:
    """In the order of the tiles and in the native one, with text on any side, masked keys and shared heads."""
    q, k, v, x, branch = operands()
    video = S if text == "none" else 63
    branch = branch | {"temporal_heads": torch.tensor([False, True, True])} | (scales() if settings else {})
    base = variant(pattern=pattern, rope_placement="map-then-rotate", **settings)
    spec = dataclasses.replace(base, text=text, heads_per_key=H)
    order = order_and_inverse(temporal_order, (7, 1, video // 7))
    mask = torch.arange(S).expand(B, -1) < S - 5 if pattern == "topk" else None
    query, key, value = q[:, :, -video:] if text == "prefix" else q, k[:, :1], v[:, :1]
    phi, _ = find_feature_map(spec.feature_map)
    mapped = Mapped(query, key, phi(query), phi(key))
    given = (query, key, value, x[:, :video], branch, order, spec)
    common: dict[str, Any] = {"scale": D**-0.5, "dtype": torch.float64, "key_mask": mask}
    expected = salad_attention(*given, **common)
    assert relative_error(salad_attention(*given, **common, mapped=mapped), expected) < 1e-12
    other = mapped._replace(rotated_key=turned(mapped.rotated_key))
    assert relative_error(salad_attention(*given, **common, mapped=other), expected) > 1e-3
