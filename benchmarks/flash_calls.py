"""flash-attn-4's own function in a Wan-style model, converted, against the same model that calls SDPA.

    python benchmarks/flash_calls.py [--package flash_attn.cute] [--tokens 32768] [--blocks 4]

Needs a GPU and the package. Prints relative errors of outputs and gradients, uncompiled and compiled, beside those of
the SDPA version uncompiled against compiled (what bfloat16 itself makes), and the time of a whole training step.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import salad_compile
from salad_compile.sites.branch import branches

TEXT = 512
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Result = dict[str, Tensor]


class Attention(nn.Module):
    def __init__(self, attend: Attend, dim: int, heads: int) -> None:
        super().__init__()
        self.attend, self.heads = attend, heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in (self.q(x), self.k(context), self.v(context)))
        out: Tensor = self.o(self.attend(q, k, v).flatten(2))
        return out


class Block(nn.Module):
    def __init__(self, attend: Attend, dim: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.own, self.cross = Attention(attend, dim, heads), Attention(attend, dim, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU("tanh"), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        y = self.norms[0](x)
        x = x + self.own(y, y)
        x = x + self.cross(self.norms[1](x), text)
        return x + self.mlp(self.norms[2](x))


class Wan(nn.Module):
    def __init__(self, attend: Attend, dim: int, heads: int, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(attend, dim, heads) for _ in range(blocks))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, text)
        return x


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def flash(package: str) -> Attend:
    function = importlib.import_module(package).flash_attn_func

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Any = function(q, k, v)
        return out[0] if isinstance(out, tuple) else out  # type: ignore[no-any-return]

    return attend


def model(attend: Attend, inputs: dict[str, Tensor], args: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    net = Wan(attend, args.heads * 128, args.heads, args.blocks).to(inputs["x"])
    net = salad_compile.convert(net, {"sparsity": 0.9, "min_tokens": 1024}, example_inputs=inputs)
    generator = torch.Generator(inputs["x"].device).manual_seed(1)
    for branch in branches(net).values():
        for _, parameter in sorted(branch.named_parameters()):
            parameter.data.normal_(0, 0.02, generator=generator)
    return net


def step(net: nn.Module, call: Callable[..., Tensor], inputs: dict[str, Tensor]) -> Result:
    net.zero_grad(set_to_none=True)
    out = call(**inputs)
    out.float().square().mean().backward()
    grads = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    return {"output": out.detach(), **grads}


def error(got: Result, want: Result) -> str:
    assert got.keys() == want.keys(), got.keys() ^ want.keys()
    each = {name: float((got[name] - want[name]).norm() / want[name].norm().clamp_min(1e-20)) for name in want}
    worst = max((name for name in each if name != "output"), key=each.__getitem__)
    return f"output {each['output']:.1e}, gradients at most {each[worst]:.1e} ({worst})"


def seconds(run: Callable[[], object]) -> float:
    times = []
    for _ in range(10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", default="flash_attn.cute")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--blocks", type=int, default=4)
    args = parser.parse_args()
    attends = {"sdpa": sdpa, args.package: flash(args.package)}
    width = args.heads * 128
    inputs = {name: torch.randn(1, n, width) for name, n in (("x", args.tokens), ("text", TEXT))}
    inputs = {name: value.to("cuda", torch.bfloat16) for name, value in inputs.items()}
    want: Result | None = None
    for name, attend in attends.items():
        net = model(attend, inputs, args)
        for how, call in (("uncompiled", net), ("compiled", torch.compile(net, backend="salad"))):
            got = step(net, call, inputs)
            want = want or {key: value.clone() for key, value in got.items()}
            took = seconds(lambda net=net, call=call: step(net, call, inputs))  # type: ignore[misc]
            print(
                f"{name}, {how}: {took * 1e3:.1f} ms a step; against sdpa, uncompiled: {error(got, want)}", flush=True
            )
        torch._dynamo.reset()


if __name__ == "__main__":
    main()
