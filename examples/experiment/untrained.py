"""What can be decided without training, on a CPU: a first-order term beside the means, sizes of pools, and selections.

    python examples/experiment/untrained.py                 all arms that have no row; about 15 minutes of one core
    python examples/experiment/untrained.py table           the block of docs/evidence.md from the rows

Attention of the dense model is replaced layer by layer, nothing is trained, and arms share clips, noises and levels. A
first-order term follows a query's score within a pool: besides its mean value, a pool then adds the covariance of its
keys and values, times the query. The product has none; this is where it was tried (docs/method.md).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import results
import torch
import torch.nn as nn
from flow import Triples, flow_losses, held_out_triples
from model import SelfAttention
from presets import FULL
from results import RESULTS, ROOT, Row
from run import ASSETS, load_dense
from torch import Tensor

from salad_compile import SaladConfig
from salad_compile.definition import patterns
from salad_compile.definition.compensation import tail_of
from salad_compile.definition.pattern import BlockCall
from salad_compile.definition.spec import AttentionSpec
from salad_compile.definition.token_layout import segments
from salad_compile.grid.orders import tile_order

ROWS = RESULTS / "untrained_cpu.jsonl"
PAGE = ROOT / "docs" / "evidence.md"
BEGIN, END = "<!-- untrained:begin -->", "<!-- untrained:end -->"
CPU = torch.device("cpu")
Order = Literal["none", "zeroth", "first, per block", "first, per query"]
TERMS: tuple[Order, ...] = ("zeroth", "first, per block", "first, per query")
START_WEIGHT = -0.5  # of the pools, as a fresh conversion has it


@dataclass(frozen=True)
class Way:
    """How attention is computed: blocks and pools in tokens, the selection, and what stands for what is left out."""

    query_block: int
    key_block: int
    pattern: str
    pool: int
    term: Order

    @property
    def name(self) -> str:
        """The key of its row."""
        return f"{self.query_block} x {self.key_block}, {self.pattern}, {self.pool}, {self.term}"

    @property
    def spec(self) -> AttentionSpec:
        """What the product's selection and means are asked for."""
        settings: dict[str, Any] = {"sparsity": 0.9, "query_block": self.query_block, "key_block": self.key_block}
        return SaladConfig(
            **settings, pattern=self.pattern, compensation="tail", compensation_pool=self.pool, linear_branch=False
        ).spec


SPARSE = Way(64, 64, "topk", 64, "none")


def _ways() -> Iterator[Way]:
    yield SPARSE
    sizes = ((64, 64), (128, 64), (16, 16))
    for query_block, key_block in sizes:
        for pattern in ("topk", "error8", "error16"):
            for pool in (64, 256):
                yield Way(query_block, key_block, pattern, pool, "zeroth")
    for query_block, key_block in sizes:
        for pattern in ("topk", "error8"):
            for term in TERMS[1:]:
                yield Way(query_block, key_block, pattern, 256 if query_block == 128 else 64, term)


WAYS = tuple(_ways())

# Percentage points, and why; written before the first row. Known: 46.0 % for means of 64 and `topk`, 59.9 % for
# `error8`, 72.9 % with blocks of 16 (512 clips), and 5 points of a first-order term beside `topk` at 64 x 64.
PREDICTIONS: tuple[tuple[Way, Way, float, float, str], ...] = (
    (Way(64, 64, "topk", 64, TERMS[1]), Way(64, 64, "topk", 64, "zeroth"), 3, 7, "5 were found on other clips"),
    (Way(64, 64, "error8", 64, TERMS[1]), Way(64, 64, "error8", 64, "zeroth"), 0.5, 4, "it chose what spreads most"),
    (Way(16, 16, "error8", 64, TERMS[1]), Way(16, 16, "error8", 64, "zeroth"), 0.5, 4, "likewise, of longer pools"),
    (Way(128, 64, "error8", 256, TERMS[1]), Way(128, 64, "error8", 256, "zeroth"), 0.5, 4, "one state for 128 queries"),
    (Way(64, 64, "error8", 256, "zeroth"), Way(64, 64, "error8", 64, "zeroth"), -4, 0, "2.5 beside `topk`"),
    (Way(16, 16, "error8", 256, "zeroth"), Way(16, 16, "error8", 64, "zeroth"), -5, -1, "a pool has 16 blocks"),
    (Way(64, 64, "error16", 64, "zeroth"), Way(64, 64, "error8", 64, "zeroth"), -5, -1, "coarser cells"),
    (Way(128, 64, "error16", 256, "zeroth"), Way(128, 64, "error8", 256, "zeroth"), -5, -1, "likewise"),
)


def covariances(key: Tensor, value: Tensor, pool: int) -> Tensor:
    """(B, H, P, D, Dv): of the keys and values of each pool, (B, H, S, any); the last pool may be short."""
    parts = zip(key.split(pool, 2), value.split(pool, 2), strict=True)
    found = []
    for keys, values in parts:
        keys, values = keys - keys.mean(2, keepdim=True), values - values.mean(2, keepdim=True)
        found.append(keys.mT @ values / keys.shape[2])
    return torch.stack(found, dim=2)


def attend(query: Tensor, key: Tensor, value: Tensor, way: Way) -> Tensor:
    """Attention of (B, H, S, D) tensors whose tokens are in the order of the blocks, as `way` computes it."""
    spec, scale, tokens = way.spec, query.shape[-1] ** -0.5, query.shape[2]
    branch = {"tail_weight": query.new_full((query.shape[1],), START_WEIGHT)}
    call = BlockCall(query, key, value, segments("none", tokens, tokens), None, branch, scale)
    selected = patterns.find(way.pattern).select(call, spec)
    chosen = (selected.lut, selected.count, way.query_block, way.key_block, scale)
    if way.term == "none":
        only: Tensor = torch.ops.salad.block_sparse_attention.default(query, key, value, *chosen)[0]
        return only
    pools = tail_of(call, selected, spec)
    out: Tensor
    out, lse = torch.ops.salad.attend_with_tail.default(query, key, value, *pools, *chosen)
    if way.term == "zeroth":
        return out
    # how much of each query's softmax every pool has
    left = pools.tokens.repeat_interleave(way.query_block, 2)[:, :, :tokens].to(query.dtype)
    weight = torch.zeros(1) if pools.log_weight is None else pools.log_weight
    scores = query @ pools.key.mT * scale + weight.to(query.dtype).view(-1, 1, 1)
    shares = left * torch.exp(scores - lse[..., None].to(query.dtype))
    if way.term == "first, per block":  # one state for a block of queries: that is what a kernel could keep
        means = torch.stack([part.mean(2) for part in shares.split(way.query_block, 2)], dim=2)
        shares = means.repeat_interleave(way.query_block, 2)[:, :, :tokens]
    states = covariances(key, value, way.pool)
    for number in range(states.shape[2]):
        out = out + shares[:, :, :, number, None] * (query @ states[:, :, number] * scale)
    return out


class Replaced(nn.Module):
    """The attention of a block of the model, computed in a `way` that can be changed."""

    def __init__(self, dense: SelfAttention, order: Tensor) -> None:
        super().__init__()
        self.dense, self.order, self.way = dense, order, SPARSE

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        """(B, S, width) -> the same."""
        query, key, value = (t[:, :, self.order] for t in self.dense.operands(x, rotation))
        attended = attend(query, key, value, self.way)[:, :, self.order.argsort()]
        out: Tensor = self.dense.to_out(attended.transpose(1, 2).flatten(2))
        return out


@torch.no_grad()
def losses_of(way: Way | None, triples: Triples) -> list[float]:
    """The loss of each held-out clip; None is dense attention."""
    model = load_dense(ASSETS / "dense.safetensors", FULL, CPU)
    if way is not None:
        order = tile_order(FULL.model.grid).long()
        for block in model.blocks:
            block.attn = Replaced(block.attn, order)  # type: ignore[arg-type]
            block.attn.way = way
    each = range(len(triples.level))
    return [float(flow_losses(model, *(tensor[one : one + 1] for tensor in triples))) for one in each]


def measure(clips: int) -> None:
    """Append the rows that are missing."""
    done = {row["way"] for row in _rows() if row["clips"] == clips}
    triples = held_out_triples(clips, FULL.model.clip, CPU)
    wanted: list[tuple[str, Way | None]] = [("dense", None), *((way.name, way) for way in WAYS)]
    for name, way in wanted:
        if name in done:
            continue
        start = time.process_time()
        losses = losses_of(way, triples)
        seconds = round(time.process_time() - start, 1)
        facts = results.about_this_run(CPU)
        results.append(ROWS, {"way": name, "clips": clips, "losses": losses, "cpu_seconds": seconds, **facts})
        print(f"{name}: {statistics.fmean(losses):.5f}, {seconds} CPU s", flush=True)


def _rows() -> list[Row]:
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []


@dataclass(frozen=True)
class Shares:
    """Shares of the gap between `SPARSE` and dense, in percent, from losses of the same clips."""

    losses: dict[str, list[float]]

    @property
    def gap(self) -> float:
        """The mean difference in loss."""
        return statistics.fmean(self.losses[SPARSE.name]) - statistics.fmean(self.losses["dense"])

    def of(self, way: Way) -> float:
        """What this way closes."""
        top = statistics.fmean(self.losses[SPARSE.name])
        return 100 * (top - statistics.fmean(self.losses[way.name])) / self.gap

    def difference(self, way: Way, other: Way) -> tuple[float, float]:
        """By how many points it closes more than the other, and the standard error over the clips."""
        pairs = zip(self.losses[way.name], self.losses[other.name], strict=True)
        each = [100 * (theirs - own) / self.gap for own, theirs in pairs]
        return statistics.fmean(each), statistics.stdev(each) / len(each) ** 0.5


def render(rows: Sequence[Row]) -> str:
    """The block of docs/evidence.md, markers included."""
    shares, facts = Shares({row["way"]: row["losses"] for row in rows}), rows[-1]
    clips = f"{facts['clips']} held-out clips, evenly spread noise levels, sparsity 0.9, nothing trained"
    commits = " and ".join(dict.fromkeys(row["commit"] for row in rows))
    lines = [BEGIN, f"{clips}; a CPU, torch {facts['torch']}, commit {commits}, {facts['date']}.", ""]
    lines += [
        "| blocks | selection | means of | means | with a first-order term, one state per query block | per query |"
    ]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    for way in (way for way in WAYS if way.term == "zeroth"):
        known = [replace(way, term=term) for term in TERMS]
        cells = [f"{shares.of(own):.1f} %" if own.name in shares.losses else "-" for own in known]
        blocks = f"{way.query_block} x {way.key_block}"
        lines.append(f"| {blocks} | `{way.pattern}` | {way.pool} | {' | '.join(cells)} |")
    lines += [
        "",
        "| difference | predicted, points | why | measured (standard error) | |",
        "| --- | --- | --- | --- | --- |",
    ]
    hits = 0
    for way, other, low, high, why in PREDICTIONS:
        points, error = shares.difference(way, other)
        hit = low <= round(points, 1) <= high
        hits += hit
        what = f"{way.name}, to {other.name}"
        verdict = "as predicted" if hit else "**no**"
        lines.append(f"| {what} | {low:g} to {high:g} | {why} | {points:.1f} ({error:.1f}) | {verdict} |")
    return "\n".join([*lines, "", f"{hits} of {len(PREDICTIONS)} as predicted.", END])


def write() -> None:
    """Rewrite the block of docs/evidence.md."""
    text = PAGE.read_text(encoding="utf-8")
    start, end = text.index(BEGIN), text.index(END) + len(END)
    PAGE.write_text(text[:start] + render(_rows()) + text[end:], encoding="utf-8")


def main(given: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", choices=("measure", "table"), default="measure")
    parser.add_argument("--clips", type=int, default=20)
    options = parser.parse_args(given)
    if options.command == "measure":
        measure(options.clips)
    write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
