"""Projections that are no plain nn.Linear: tuples, other names, keywords, transposed weights, convolutions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import salad_compile
from salad_compile.common.projections import channels, holds_outputs_first, weight_name
from salad_compile.errors import ExportError, MergeError
from tests.support import TINY, check_rewrite, randomise_branches, relative_error, run, seeded

WIDTH, HEADS = 16, 2


class Replicated(nn.Module):
    """As serving engines have it: (output, bias), the bias apart, and sizes under names of its own."""

    def __init__(self, given: int, out: int) -> None:
        super().__init__()
        self.input_size, self.output_size = given, out
        self.weight, self.bias = nn.Parameter(torch.randn(out, given) * 0.2), nn.Parameter(torch.randn(out) * 0.1)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return F.linear(x, self.weight, self.bias), None


class Pair(NamedTuple):
    result: Tensor
    scale: float


class Named(nn.Linear):
    """A subclass that returns a named tuple."""

    def forward(self, x: Tensor) -> Pair:  # type: ignore[override]
        return Pair(super().forward(x), 1.0)


class Kernel(nn.Module):
    """A weight under another name and (in, out), as it comes from JAX."""

    def __init__(self, given: int, out: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(given, out) * 0.2)
        self.shift = nn.Parameter(torch.randn(out) * 0.1)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.einsum("...i,io->...o", inputs, self.kernel.to(inputs.dtype)) + self.shift


class Position(nn.Module):
    """A square matrix, and no projection: one row for each token."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(tokens, tokens) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table


class Attention(nn.Module):
    def __init__(self, make: Callable[[int, int], nn.Module], fused: bool, keyword: str) -> None:
        super().__init__()
        self.keyword = keyword
        self.inputs = nn.ModuleList(
            make(WIDTH, 3 * WIDTH) if fused else make(WIDTH, WIDTH) for _ in "q" * (3 - 2 * fused)
        )
        self.o = make(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for module in self.inputs
            for part in self._call(module, x).chunk(3 // len(self.inputs), -1)
        )
        return self._call(self.o, F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def _call(self, module: nn.Module, x: Tensor) -> Tensor:
        out = module(**{self.keyword: x}) if self.keyword else module(x)
        return out[0] if isinstance(out, tuple) else out


class SingleBlock(nn.Module):
    """One Linear for query, key, value and an MLP, and one for what both of them made."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.order = order
        self.linear1, self.o = nn.Linear(WIDTH, 3 * WIDTH + 24), nn.Linear(WIDTH + 24, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        fused = self.linear1(x)
        if self.order == "first":
            qkv, mlp = fused.split([3 * WIDTH, 24], dim=-1)
            q, k, v = qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        else:  # value, a part of the MLP, query, the other part, key
            v, a, q, b, k = torch.split(fused, [WIDTH, 8, WIDTH, 16, WIDTH], dim=-1)
            q, k, v = (part.reshape(*x.shape[:2], HEADS, -1).transpose(1, 2) for part in (q, k, v))
            mlp = torch.cat([a, b], dim=-1)
        out = F.scaled_dot_product_attention(F.normalize(q, dim=-1) * 3, F.normalize(k, dim=-1) * 3, v)
        result: Tensor = self.o(torch.cat([out.transpose(1, 2).flatten(2), F.gelu(mlp)], dim=-1))
        return result


class GatedQuery(nn.Module):
    """The query's Linear makes a gate of the output, too; keys and values have one head."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8)
        self.o = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        gate, q = self.q(x).chunk(2, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, 8)).transpose(1, 2) for part in (q, self.k(x), self.v(x)))
        out = F.scaled_dot_product_attention(q, *(part.expand(-1, HEADS, -1, -1) for part in (k, v)))
        result: Tensor = self.o(out.transpose(1, 2).flatten(2) * gate.sigmoid())
        return result


class Stacked(nn.Module):
    """Query, key and value on one axis for one exchange between processes, rotated in place there, and apart again."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        parts = [module(x).unflatten(-1, (HEADS, -1)) for module in (self.q, self.k, self.v)]
        angle = torch.linspace(0, 2, x.shape[1])[:, None, None] * torch.ones(4)
        if self.way == "cat":
            joined = torch.cat(parts, dim=0)
            joined[: 2 * len(x)] = rotate(joined[: 2 * len(x)], angle)
            q, k, v = joined.chunk(3, dim=0)
        else:
            joined = torch.stack([rotate(part, angle) for part in parts[:2]])
            (q, k), v = joined.unbind(0), parts[2]
        out = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (q, k, v)))
        result: Tensor = self.o(out.transpose(1, 2).flatten(2))
        return result


def rotate(x: Tensor, angle: Tensor) -> Tensor:
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()
    return torch.stack(turned, dim=-1).flatten(-2).type_as(x)


class Convolved(nn.Module):
    """Convolutions of size one on (B, C, T, H, W), in the place of projections."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Conv3d(WIDTH, WIDTH, 1) for _ in range(3))
        self.o = nn.Conv1d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        volume = x.transpose(1, 2).unflatten(2, (2, 6, 9))
        q, k, v = (m(volume).flatten(2).unflatten(1, (HEADS, -1)).transpose(2, 3) for m in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v)
        result: Tensor = self.o(out.transpose(2, 3).flatten(1, 2)).transpose(1, 2)
        return result


class Model(nn.Module):
    def __init__(self, attention: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.patch = nn.Conv3d(4, WIDTH, (1, 2, 2), (1, 2, 2))
        self.blocks = nn.ModuleList(attention() for _ in range(2))

    def forward(self, video: Tensor) -> Tensor:
        x = self.patch(video).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = x + block(x)
        return x


STYLES: dict[str, Callable[[], nn.Module]] = {
    "tuple": lambda: Attention(Replicated, False, ""),
    "tuple-fused-keyword": lambda: Attention(Replicated, True, "x"),
    "named-tuple": lambda: Attention(Named, False, ""),
    "transposed": lambda: Attention(Kernel, False, "inputs"),
    "transposed-fused": lambda: Attention(Kernel, True, ""),
    "keyword": lambda: Attention(nn.Linear, False, "input"),
    "convolution": Convolved,
    "with-mlp": lambda: SingleBlock("first"),
    "with-mlp-between": lambda: SingleBlock("between"),
    "with-gate": GatedQuery,
    "joined": lambda: Stacked("cat"),
    "stacked": lambda: Stacked("stack"),
}
QUICK = ("tuple-fused-keyword", "transposed", "convolution", "with-mlp-between", "joined")


def inputs() -> dict[str, Tensor]:
    with seeded(0):
        return {"video": torch.randn(2, 4, 2, 12, 18)}


def model_of(style: str) -> nn.Module:
    with seeded(1):
        return Model(STYLES[style])


def converted(style: str, **changes: Any) -> nn.Module:
    model = salad_compile.convert(model_of(style), dataclasses.replace(TINY, **changes), example_inputs=inputs())
    randomise_branches(model)
    return model


def styles() -> Any:
    marked = [pytest.param(s, marks=() if s in QUICK else pytest.mark.all_cases) for s in STYLES]
    return pytest.mark.parametrize("style", marked)


@pytest.mark.parametrize("style", STYLES)
def test_are_found(style: str) -> None:
    plan = salad_compile.plan(model_of(style), inputs(), config=TINY)
    assert [(site.name, site.kind, site.reason) for site in plan.sites[""]] == [
        (f"blocks.{i}", "self", "") for i in range(2)
    ]
    assert all(site.out == f"{site.name}.o" and site.on_grid for site in plan.eligible)


@styles()
def test_sparsity_zero_equals_dense(style: str) -> None:
    expected = model_of(style)(**inputs())
    model = salad_compile.convert(model_of(style), dataclasses.replace(TINY, sparsity=0.0), example_inputs=inputs())
    assert relative_error(model(**inputs()), expected) < 1e-6


@styles()
def test_compiled_equals_uncompiled(style: str) -> None:
    check_rewrite(converted(style), inputs(), sites=2)


@styles()
def test_is_saved_and_merged(style: str, tmp_path: Path) -> None:
    model = converted(style)
    expected = run(model, inputs(), gradients=False).output
    salad_compile.save(model, tmp_path / "a.safetensors")
    loaded = salad_compile.load(model_of(style), tmp_path / "a.safetensors")
    assert torch.equal(run(loaded, inputs(), gradients=False).output, expected)
    assert salad_compile.merge_lora(model)
    assert not [name for name, _ in model.named_parameters() if "low_rank" in name]
    assert relative_error(run(model, inputs(), gradients=False).output, expected) < 1e-5


def test_a_gate_belongs_to_its_own_token_of_a_convolution() -> None:
    model = converted("convolution", rope_placement="rotate-then-map")
    given = inputs()["video"]
    alone = torch.cat([model(part) for part in given.split(1)])
    assert relative_error(model(given), alone) < 1e-5
    dense = converted("convolution", sparsity=0.0)
    assert relative_error(dense(given.flip(2)).unflatten(1, (2, -1)).flip(1).flatten(1, 2), dense(given)) < 1e-5


def test_what_a_module_is_follows_from_its_sizes_and_its_forward() -> None:
    found = {
        type(m).__name__: (channels(m), weight_name(m), holds_outputs_first(m))
        for m in (nn.Linear(3, 5), Replicated(3, 5), Named(3, 5), Kernel(3, 5), nn.Conv2d(3, 5, 1))
    }
    assert found == {
        "Linear": ((3, 5), "weight", True),
        "Replicated": ((3, 5), "weight", True),
        "Named": ((3, 5), "weight", True),
        "Kernel": ((3, 5), "kernel", False),
        "Conv2d": ((3, 5), "weight", True),
    }
    assert holds_outputs_first(Kernel(4, 4)) is False
    assert channels(nn.Conv2d(3, 5, 3)) is channels(nn.LayerNorm(4)) is channels(nn.Embedding(3, 4)) is None


def test_a_table_of_positions_is_no_projection() -> None:
    class Placed(Attention):
        def __init__(self) -> None:
            super().__init__(nn.Linear, False, "")
            self.position = Position(108)
            self.inputs = nn.ModuleList(nn.Linear(108, 108) for _ in "qkv")
            self.o = nn.Linear(108, WIDTH)
            self.widen = nn.Linear(WIDTH, 108)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.position(self.widen(x)))

        def _call(self, module: nn.Module, x: Tensor) -> Tensor:
            out: Tensor = module(x)
            return out

    plan = salad_compile.plan(Model(Placed), inputs(), config=TINY)
    assert [site.query for site in plan.eligible] == [("blocks.0.inputs.0",), ("blocks.1.inputs.0",)]


def test_what_is_no_product_is_not_merged() -> None:
    class Squashed(Replicated):
        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            return torch.tanh(super().forward(x)[0]), None

    model = salad_compile.convert(Model(lambda: Attention(Squashed, False, "")), TINY, example_inputs=inputs())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(MergeError, match=r"blocks\.0\.inputs\.0.*Squashed, which is not simply the product"):
        salad_compile.merge_lora(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_channels_that_two_roles_share_are_refused() -> None:
    class KeyIsQuery(GatedQuery):
        """One Linear for the query, which is the key as well, the value and a gate."""

        def __init__(self) -> None:
            super().__init__()
            self.fused = nn.Linear(WIDTH, 3 * WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            q, v, gate = self.fused(x).chunk(3, dim=-1)
            q, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (q, v))
            out = F.scaled_dot_product_attention(q, q, v).transpose(1, 2).flatten(2)
            result: Tensor = self.o(out * gate.sigmoid())
            return result

    plan = salad_compile.plan(Model(KeyIsQuery), inputs(), config=TINY)
    assert ["overlap in the 48 output channels" in site.reason for site in plan.sites[""]] == [True, True]


def test_convolutions_have_no_place_in_lora_files(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"blocks\.0\.q' is a convolution"):
        salad_compile.export(converted("convolution"), tmp_path / "out", formats=["peft"])
