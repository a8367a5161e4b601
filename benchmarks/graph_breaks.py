"""What a graph break inside attention costs: two Wan-style blocks, compiled, with a break behind projections and not.

Behind a break the module runs uncompiled, and the SALAD definition in it compiled. Every round times every row once, in
turn, on one core.

    python benchmarks/graph_breaks.py            9 rounds, width 768, 4,096 tokens: two minutes
    python benchmarks/graph_breaks.py --quick    1 round, narrow and short: checks that it runs
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from common import RESULTS, Facts, Results, describe, spread
from torch import Tensor

import salad_compile

HEAD_DIM = 128
SETTINGS = {"sparsity": 0.8, "query_block": 64, "key_block": 64, "min_tokens": 256}


class Attention(nn.Module):
    """Self-attention with norms over the width and rotated pairs of channels."""

    def __init__(self, width: int, breaks: bool) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.query_norm, self.key_norm, self.breaks = nn.RMSNorm(width), nn.RMSNorm(width), breaks

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(B, S, C) -> (B, S, C). cos, sin: (S, 1, head_dim / 2)."""
        qkv = self.query_norm(self.query(x)), self.key_norm(self.key(x)), self.value(x)
        if self.breaks:
            torch._dynamo.graph_break()
        query, key, value = (tensor.unflatten(-1, (-1, HEAD_DIM)) for tensor in qkv)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        out = F.scaled_dot_product_attention(*(tensor.transpose(1, 2) for tensor in (query, key, value)))
        result: Tensor = self.out(out.transpose(1, 2).flatten(2))
        return result


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs of neighbouring channels, turned."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


class Block(nn.Module):
    """Attention and a feed-forward part, both modulated."""

    def __init__(self, width: int, breaks: bool) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attention = Attention(width, breaks)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.modulation = nn.Parameter(torch.randn(6, width) * 0.1)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(B, S, C) -> (B, S, C)."""
        m = self.modulation
        x = x + m[2] * self.attention(self.norms[0](x) * (1 + m[0]) + m[1], cos, sin)
        result: Tensor = x + m[5] * self.feed_forward(self.norms[1](x) * (1 + m[3]) + m[4])
        return result


class Model(nn.Module):
    """Two blocks over the tokens of a video."""

    def __init__(self, width: int, breaks: bool) -> None:
        super().__init__()
        self.patch = nn.Conv3d(4, width, 1)
        self.blocks = nn.ModuleList(Block(width, breaks) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 4, T, H, W) -> (B, T H W, C)."""
        tokens: Tensor = self.patch(x).flatten(2).transpose(1, 2)
        angles = torch.arange(tokens.shape[1])[:, None, None] * 0.1 ** torch.arange(HEAD_DIM // 2)
        for block in self.blocks:
            tokens = block(tokens, angles.cos(), angles.sin())
        return tokens


def time_rows(width: int, frames: int, rounds: int) -> list[Facts]:
    """One JSON row for each way."""
    x = torch.randn(1, 4, frames, 16, 16)
    models: dict[str, nn.Module] = {}
    for name, breaks in (("without a break", False), ("with a break", True), ("uncompiled", False)):
        torch.manual_seed(0)
        model = salad_compile.convert(Model(width, breaks), SETTINGS, example_inputs={"x": x})
        models[name] = model if name == "uncompiled" else torch.compile(model, backend="salad")
    times: dict[str, list[float]] = {name: [] for name in models}
    for number in range(-2, rounds):  # the first rounds compile
        for name, model in models.items():
            before = time.process_time()
            model(x)
            if number >= 0:
                times[name].append((time.process_time() - before) * 1e3)
    base = float(spread(times["without a break"])["median_ms"])
    rows = []
    for name, measured in times.items():
        summary = spread(measured)
        rows.append(
            {"row": name, "width": width, "tokens": frames * 256, **summary, "times_base": summary["median_ms"] / base}
        )
    return rows


def main() -> None:
    """Run the benchmark, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1 round of 512 tokens")
    output = RESULTS / "graph_breaks_cpu.json"
    parser.add_argument("--output", type=Path, default=output, help="where the JSON goes (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        rows = time_rows(256, 2, 1) if options.quick else time_rows(768, 16, 9)
    for row in rows:
        print(f"{row['row']:18}{row['median_ms']:10.1f} ms{row['times_base']:8.3f}")
    Results(options.output, describe(torch.device("cpu")) | {"threads": 1, "settings": SETTINGS}).add(rows)


if __name__ == "__main__":
    main()
