"""Models that are written for inference: discovery sees through what they switch off, write into, and read."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import salad_compile
from tests import toys
from tests.support import randomise_branches, relative_error

CONFIG = salad_compile.SaladConfig(
    compensation="none", sparsity=0.0, query_block=16, key_block=16, lora_rank=2, min_tokens=64
)
INPUTS = (toys.tokens(96),)


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, -1))


def rotate(x: Tensor) -> Tensor:
    angles = torch.linspace(0, 3, x.shape[1])[:, None, None]
    first, second = x.chunk(2, -1)
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(toys.WIDTH, toys.WIDTH) for _ in range(4))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
        result: Tensor = self.o(out.transpose(1, 2).flatten(2))
        return result

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attend(*(heads(project(x)) for project in (self.q, self.k, self.v)))


class NoGrad(Attention):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Inference(Attention):
    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class WritesIntoProjections(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        q += 1
        k[:, :3] *= 2
        v.mul_(0.5)
        return x + self.attend(heads(q), heads(k), heads(v))


class WritesIntoPieces(Attention):
    """Autograd forbids it, for inference it is fine."""

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        q, k = heads(self.q(x)), heads(self.k(x))
        for piece in (*q.chunk(2, -1), *k.unbind(2)):
            piece.mul_(0.5)
        return x + self.attend(q, k, heads(self.v(x)))


class ReadsItsScores(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads(project(x)).transpose(1, 2) for project in (self.q, self.k, self.v))
        scores = q @ k.mT * q.shape[-1] ** -0.5
        assert scores.shape[-1] == scores.size()[-2] == x.shape[1]
        assert scores.stride()[-1] == 1
        assert scores.dtype == q.dtype
        out = scores.softmax(-1) @ v
        result: Tensor = x + self.o(out.transpose(1, 2).flatten(2))
        return result


class CutsAtTensors(Attention):
    """The bound of a slice is a tensor, behind a rotation."""

    def forward(self, x: Tensor) -> Tensor:
        length = torch.tensor(x.shape[1])
        q, k = (rotate(heads(project(x)))[:, :length] for project in (self.q, self.k))
        return x + self.attend(q, k, heads(self.v(x)))


KINDS = [NoGrad, Inference, WritesIntoProjections, WritesIntoPieces, ReadsItsScores, CutsAtTensors]


@pytest.mark.parametrize("kind", KINDS)
def test_the_site_is_found_and_is_the_models_attention(kind: type[Attention]) -> None:
    torch.manual_seed(0)
    model = toys.Stack(kind(), kind())
    with torch.no_grad():
        dense = model(*INPUTS)
    assert len(salad_compile.plan(model, INPUTS, config=CONFIG).eligible) == 2
    salad_compile.convert(model, CONFIG, example_inputs=INPUTS)
    with torch.no_grad():
        assert relative_error(model(*INPUTS), dense) < 1e-5
        randomise_branches(model)
        out = model(*INPUTS)
        assert relative_error(out, dense) > 1e-2
        compiled = torch.compile(model, backend="salad", options={"lowering": "eager"})
        assert relative_error(compiled(*INPUTS), out) < 1e-5


def test_plan_convert_and_load_inside_inference_mode(tmp_path: Any) -> None:
    torch.manual_seed(0)
    base = toys.Stack(Attention(), Attention())
    model = salad_compile.convert(copy.deepcopy(base), CONFIG, example_inputs=INPUTS)
    randomise_branches(model)
    path, twin = salad_compile.save(model, tmp_path), copy.deepcopy(base)
    with torch.inference_mode():
        inputs = (INPUTS[0].clone(),)
        assert len(salad_compile.plan(base, inputs, config=CONFIG).eligible) == 2
        fresh = salad_compile.convert(twin, CONFIG, example_inputs=inputs)
        loaded = salad_compile.load(base, path)
        expected = model(*inputs)
        assert torch.equal(loaded(*inputs), expected)
        built = toys.Stack(Attention())
        assert len(salad_compile.plan(built, inputs, config=CONFIG).eligible) == 1
    for trained in (fresh, loaded):
        assert not [name for name, p in trained.named_parameters() if p.is_inference()]
        trained(*INPUTS).square().sum().backward()
        assert all(p.grad is not None for p in trained.parameters() if p.requires_grad)
