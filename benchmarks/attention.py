"""The kernels against dense attention on a GPU: a comparison for each shape, its rows timed in turn.

    python benchmarks/attention.py                          everything, the most important shapes first
    python benchmarks/attention.py --shapes 1.3B-480p       one comparison
    python benchmarks/attention.py --quick --device cpu     small sizes, two rounds: checks that it runs

benchmarks/README.md describes the rows and the timing.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import rival_kernels
import torch
import torch.nn.functional as F
from common import (
    LOADED,
    NOT_INSTALLED,
    Budget,
    Clock,
    Facts,
    Results,
    Row,
    Run,
    clock_for,
    compare_bursts,
    default_output,
    describe,
    free_memory,
    select,
    take_both_turns,
    warm_up,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from salad_compile.definition.attention import salad_attention, sparse_attention
from salad_compile.definition.linear_branch import linear_attention
from salad_compile.definition.operands import Mapped
from salad_compile.definition.spec import AttentionSpec, density_permille
from salad_compile.definition.tensors import BranchTensors
from salad_compile.definition.token_layout import segments
from salad_compile.kernels import (
    block_sparse_attention,
    measure_executions,
)

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward + backward"
# Matrix products of each pass over those of the forward; the backward needs five for the forward's two.
PASSES = {FORWARD: 1.0, BACKWARD: 2.5, BOTH: 3.5}
QUERY_BLOCK, KEY_BLOCK = 128, 64
REST_S = 0.05  # before a timing of a burst
STRUCTURE_RANK, STRUCTURE_RUN = 4, 256
INPUTS = (
    f"normal noise plus {STRUCTURE_RANK} shared directions per head, with a random strength for each run of "
    f"{STRUCTURE_RUN} tokens, in query and key; selected by the routing itself"
)
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One comparison: a shape, and which rows are timed at it."""

    name: str
    tokens: int
    heads: int = 12
    head_dim: int = 128
    batch: int = 1
    rows: str = "all"  # "large": without the slowest; "sparsities" and "length": dense, sparse and operator forwards

    def quick(self) -> Case:
        """The same at a size for tests."""
        return dataclasses.replace(self, tokens=max(self.tokens // 64, 80), heads=2, head_dim=self.head_dim // 4)


# In the order of importance: what exceeds the budget is left out.
CASES = (
    Case("1.3B-480p", 32_760),
    Case("14B-720p", 75_600, heads=40, rows="large"),
    Case("1.3B-720p", 75_600, rows="large"),
    Case("sparsity", 32_760, rows="sparsities"),
    *(
        Case(f"length-{tokens}", tokens, rows="length")
        for tokens in (16_384, 8_192, 65_536, 5_120, 131_072, 12_288, 32_768)
    ),
    Case("D64", 32_760, heads=24, head_dim=64, rows="length"),
)


def sdpa(backend: SDPBackend | None = None) -> Attend:
    """PyTorch's attention, with one of its kernels or the kernel it chooses."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if backend is None:
            return F.scaled_dot_product_attention(query, key, value)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value)

    return attend


PACKAGES: dict[str, Callable[[], Attend]] = {
    "FlashAttention-3": rival_kernels.flash_attention_3,
    "FlashAttention-4": rival_kernels.flash_attention_4,
}
DENSE: dict[str, Callable[[], Attend]] = {"SDPA": sdpa, **PACKAGES}
DENSE_ON_CUDA: dict[str, Callable[[], Attend]] = {
    "SDPA cuDNN": lambda: sdpa(SDPBackend.CUDNN_ATTENTION),
    "SDPA flash": lambda: sdpa(SDPBackend.FLASH_ATTENTION),
    **PACKAGES,
}


class Inputs:
    """The tensors of a comparison, in several sets that the timings rotate through, and selections made from them."""

    def __init__(self, case: Case, device: torch.device, seed: int) -> None:
        self.case, self.device = case, device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.generator = torch.Generator(device).manual_seed(seed)
        size = case.batch * case.tokens * case.heads * case.head_dim * self.dtype.itemsize
        self.tensor_bytes = size
        # four small sets exceed any L2 cache; large ones do anyway
        self.sets = [self._structured() for _ in range(4 if size < 2**27 else 2)]
        self._selections: dict[tuple[int, int, int], tuple[list[tuple[Tensor, Tensor]], int]] = {}

    def normal(self, *shape: int) -> Tensor:
        """Random numbers of the comparison's dtype."""
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=self.dtype)

    def _structured(self) -> tuple[Tensor, Tensor, Tensor]:
        """query, key, value as permuted views of (B, S, H, D), as they reach attention in a model.

        A few directions per head with a strength of their own in every run of tokens: pure noise would make all pooled
        scores alike, and the selected blocks would spread evenly over the keys.
        """
        case = self.case
        directions = self.normal(case.heads, STRUCTURE_RANK, case.head_dim)

        def tensor(structured: bool) -> Tensor:
            x = self.normal(case.batch, case.tokens, case.heads, case.head_dim)
            if structured:
                runs = -(-case.tokens // STRUCTURE_RUN)
                strength = self.normal(case.batch, runs, case.heads, STRUCTURE_RANK) * STRUCTURE_RANK**-0.5
                pattern = torch.einsum("brhk,hkd->brhd", strength, directions)
                x += pattern.repeat_interleave(STRUCTURE_RUN, dim=1)[:, : case.tokens]
            return x.transpose(1, 2)

        return tensor(True), tensor(True), tensor(False)

    def of(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """The set of a timing."""
        return self.sets[number % len(self.sets)]

    @functools.cached_property
    def leaves(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """The same tensors, requiring gradients."""
        alike = [[x.detach().requires_grad_() for x in tensors] for tensors in self.sets]
        return [(query, key, value) for query, key, value in alike]

    @functools.cached_property
    def grad_out(self) -> Tensor:
        """An incoming gradient, (B, H, S, D) over (B, S, H, D)."""
        case = self.case
        return self.normal(case.batch, case.tokens, case.heads, case.head_dim).transpose(1, 2)

    @functools.cached_property
    def branch(self) -> tuple[Tensor, BranchTensors]:
        """The gate's input, and the gate and projection of a site."""
        width = self.case.heads * self.case.head_dim
        tensors = {
            "gate_weight": self.normal(width) * width**-0.5,
            "gate_bias": self.normal(1),
            "proj_weight": self.normal(width, width) * width**-0.5,
            "proj_bias": self.normal(width),
        }
        return self.normal(self.case.batch, self.case.tokens, width), tensors

    def selection(self, query_block: int, key_block: int, permille: int) -> tuple[list[tuple[Tensor, Tensor]], int]:
        """(lut, count) of every set, and the token pairs they compute (the mean over the sets)."""
        wanted = (query_block, key_block, permille)
        if wanted not in self._selections:
            chosen = [select(q, k, query_block, key_block, permille) for q, k, _ in self.sets]
            with measure_executions() as executions:
                for (q, k, v), pair in zip(self.sets, chosen, strict=True):
                    block_sparse_attention(q, k, v, *pair, query_block, key_block, q.shape[-1] ** -0.5)
            pairs = sum(execution.computed_pairs for execution in executions) // len(executions)
            self._selections[wanted] = chosen, pairs
        return self._selections[wanted]

    @property
    def all_pairs(self) -> int:
        """Token pairs of dense attention."""
        return self.case.batch * self.case.heads * self.case.tokens**2


class Comparison:
    """The rows of one case. Every method that starts with `row_` makes one."""

    def __init__(self, case: Case, inputs: Inputs, *, compiled: bool) -> None:
        self.case, self.inputs, self.compiled = case, inputs, compiled
        self.scale = case.head_dim**-0.5

    # --- what is timed ------------------------------------------------------------------------------------------

    def _forward(self, attend: Attend) -> Run:
        return lambda number: attend(*self.inputs.of(number))

    def _both(self, attend: Attend) -> Run:
        def run(number: int) -> object:
            leaves = self.inputs.leaves[number % len(self.inputs.leaves)]
            return torch.autograd.grad(attend(*leaves), leaves, self.inputs.grad_out)

        return run

    def _backward(self, attend: Attend) -> Run:
        """The backward alone, over a graph that is kept."""
        leaves = self.inputs.leaves[0]
        out = attend(*leaves)
        return lambda number: torch.autograd.grad(out, leaves, self.inputs.grad_out, retain_graph=True)

    def _run(self, attend: Attend, step: str) -> Run:
        return {FORWARD: self._forward, BACKWARD: self._backward, BOTH: self._both}[step](attend)

    def _sparsity(self, facts: Facts, pairs: int) -> None:
        facts["measured_sparsity"] = 1 - pairs / self.inputs.all_pairs

    def _flops(self, facts: Facts, pairs: int) -> None:
        """4 * pairs * D for the forward: two products of a multiply and an add; only pairs that are computed count."""
        self._sparsity(facts, pairs)
        facts["flops"] = 4 * pairs * self.case.head_dim * PASSES[facts["pass"]]

    def _row(self, name: str, kind: str, step: str, prepare: Callable[[Facts], Run], **facts: object) -> Row:
        case = self.case
        shape = {"batch": case.batch, "heads": case.heads, "tokens": case.tokens, "head_dim": case.head_dim}
        about = {"row": name, "case": case.name, "kind": kind, "pass": step, **shape, **facts}
        return Row(about | {"dtype": str(self.inputs.dtype).removeprefix("torch."), "inputs": INPUTS}, prepare)

    # --- rows ---------------------------------------------------------------------------------------------------

    def ceilings(self) -> Iterator[Row]:
        """The limits of the device: a large matrix product, and a large copy (bytes read plus bytes written)."""
        big = self.inputs.device.type == "cuda"
        size = 8192 if big else 256

        def matmul(facts: Facts) -> Run:
            pairs = [(self.inputs.normal(size, size), self.inputs.normal(size, size)) for _ in range(2)]
            facts["flops"] = 2 * size**3
            return lambda number: pairs[number % 2][0] @ pairs[number % 2][1]

        def copy(facts: Facts) -> Run:
            source = self.inputs.normal(2**29 if big else 2**20)
            target = torch.empty_like(source)
            facts["bytes"] = 2 * source.nbytes
            return lambda number: target.copy_(source)

        yield self._row(f"matmul {size}", "ceiling", FORWARD, matmul)
        yield self._row("copy", "ceiling", FORWARD, copy)

    def dense(self, step: str) -> Iterator[Row]:
        """PyTorch's attention, once for every kernel that it has for this device, and FlashAttention-3 and -4."""
        cuda = self.inputs.device.type == "cuda"
        for name, make in (DENSE_ON_CUDA if cuda else DENSE).items():
            # report a missing package once, with the forward
            if step == FORWARD or name not in PACKAGES or rival_kernels.has_backward(name):
                yield self._row(f"dense {name}", "dense", step, self._dense(make, step), sparsity=0.0)

    def _dense(self, make: Callable[[], Attend], step: str) -> Callable[[Facts], Run]:
        def prepare(facts: Facts) -> Run:
            self._flops(facts, self.inputs.all_pairs)
            return self._run(make(), step)

        return prepare

    def sparse(self, step: str, sparsity: float, blocks: tuple[int, int] = (QUERY_BLOCK, KEY_BLOCK)) -> Row:
        """The block-sparse kernel alone, on an existing selection."""
        permille = density_permille(sparsity)

        def prepare(facts: Facts) -> Run:
            chosen, pairs = self.inputs.selection(*blocks, permille)
            self._flops(facts, pairs)
            if not sparsity:
                facts["difference_to_dense"] = self._difference(chosen[0], blocks)
            return self._sparse_run(chosen, blocks, step)

        name = f"block-sparse {step}"
        return self._row(name, "salad", step, prepare, sparsity=sparsity, query_block=blocks[0], key_block=blocks[1])

    def _sparse_run(self, chosen: list[tuple[Tensor, Tensor]], blocks: tuple[int, int], step: str) -> Run:
        def attend(number: int) -> Attend:
            lut, count = chosen[number % len(chosen)]

            def attended(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
                out: Tensor = block_sparse_attention(query, key, value, lut, count, *blocks, self.scale)[0]
                return out

            return attended

        if step == BACKWARD:
            return self._backward(attend(0))
        return lambda number: self._run(attend(number), step)(number)

    def _difference(self, chosen: tuple[Tensor, Tensor], blocks: tuple[int, int]) -> float:
        """Relative L2 distance of the kernel, with everything selected, to PyTorch's attention in the same dtype."""
        query, key, value = self.inputs.sets[0]
        ours = block_sparse_attention(query, key, value, *chosen, *blocks, self.scale)[0].float()
        theirs = F.scaled_dot_product_attention(query, key, value).float()
        return float((ours - theirs).norm() / theirs.norm())

    def routing(self, sparsity: float) -> Row:
        """Pooling of queries and keys, scores, and the choice of blocks."""
        permille = density_permille(sparsity)

        def prepare(facts: Facts) -> Run:
            self._sparsity(facts, self.inputs.selection(QUERY_BLOCK, KEY_BLOCK, permille)[1])
            facts["bytes"] = 2 * self.inputs.tensor_bytes  # query and key, read once
            return lambda number: select(*self.inputs.of(number)[:2], QUERY_BLOCK, KEY_BLOCK, permille)

        return self._row("routing alone", "salad", FORWARD, prepare, sparsity=sparsity)

    def linear(self) -> Row:
        """The linear branch: its state, and the output for every query."""

        def prepare(facts: Facts) -> Run:
            facts["bytes"] = 4 * self.inputs.tensor_bytes  # key, value and query read once, the result written once
            spec = _spec(0.0)  # the linear branch sees all tokens, whatever the sparsity
            return self._forward(lambda query, key, value: linear_attention(query, key, value, spec))

        return self._row("linear branch alone", "salad", FORWARD, prepare)

    def beside(self, sparsity: float) -> Row:
        """The operator without block-sparse attention."""
        spec = _spec(sparsity)

        def run(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
            selected = select(query, key, QUERY_BLOCK, KEY_BLOCK, spec.permille)
            return linear_attention(query, key, value, spec), *selected

        def prepare(facts: Facts) -> Run:
            facts["bytes"] = 4 * self.inputs.tensor_bytes
            return lambda number: run(*self.inputs.of(number))

        return self._row("routing + linear branch", "salad", FORWARD, prepare, sparsity=sparsity)

    def operator(self, step: str, sparsity: float) -> Row:
        """Routing, block-sparse attention, linear branch, and their sum; without gate and projection."""
        spec, scale = _spec(sparsity), self.scale
        where = segments("none", self.case.tokens, self.case.tokens)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            sparse = sparse_attention(query, key, value, where, spec, scale)
            return sparse + linear_attention(query, key, value, spec)

        def prepare(facts: Facts) -> Run:
            self._flops(facts, self.inputs.selection(QUERY_BLOCK, KEY_BLOCK, spec.permille)[1])
            return self._run(attend, step)

        return self._row(f"operator {step}", "salad", step, prepare, sparsity=sparsity)

    def operator_on_features(self, sparsity: float) -> Row:
        """The same with map-then-rotate: the linear branch reads four more tensors, which the model makes."""
        spec, scale = dataclasses.replace(_spec(sparsity), rope_placement="map-then-rotate"), self.scale
        where = segments("none", self.case.tokens, self.case.tokens)

        def prepare(facts: Facts) -> Run:
            self._flops(facts, self.inputs.selection(QUERY_BLOCK, KEY_BLOCK, spec.permille)[1])
            query, key, _ = self.inputs.of(0)
            mapped = Mapped(query.relu(), key.relu(), query.relu(), key.relu())

            def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
                sparse = sparse_attention(query, key, value, where, spec, scale)
                return sparse + linear_attention(query, key, value, spec, None, mapped)

            return self._forward(attend)

        return self._row("operator forward, map-then-rotate", "salad", FORWARD, prepare, sparsity=sparsity)

    def operator_with_projection(self, sparsity: float) -> Row:
        """All of SALAD before the output projection, as models run it: with the gate and the D x D projection."""
        spec, scale = _spec(sparsity), self.scale  # not self: Dynamo's caches would keep the inputs alive

        def attend(query: Tensor, key: Tensor, value: Tensor, x: Tensor, branch: BranchTensors) -> Tensor:
            return salad_attention(query, key, value, x, branch, None, spec, scale=scale, dtype=query.dtype)

        def prepare(facts: Facts) -> Run:
            self._flops(facts, self.inputs.selection(QUERY_BLOCK, KEY_BLOCK, spec.permille)[1])
            call = torch.compile(attend, fullgraph=True) if self.compiled else attend
            return lambda number: call(*self.inputs.of(number), *self.inputs.branch)

        name = "operator + Proj forward"
        return self._row(name, "salad", FORWARD, prepare, sparsity=sparsity, compiled=self.compiled)

    def others(self, sparsity: float) -> Iterator[Row]:
        """Sparse kernels of other projects on the same selection."""
        permille = density_permille(sparsity)

        def rotate(facts: Facts, blocks: tuple[int, int], make: Callable[[Tensor, Tensor], Attend], pad: int) -> Run:
            chosen, pairs = self.inputs.selection(*blocks, permille)
            attends = [make(lut.contiguous(), count.contiguous()) for lut, count in chosen]
            self._flops(facts, pairs)
            sets = [[F.pad(x, (0, 0, 0, pad)).contiguous() for x in tensors] for tensors in self.inputs.sets]
            return lambda number: attends[number % len(sets)](*sets[number % len(sets)])

        def sla(facts: Facts) -> Run:
            blocks = (QUERY_BLOCK, KEY_BLOCK)
            return rotate(facts, blocks, lambda lut, _: rival_kernels.sla(lut, *blocks, self.case.tokens), 0)

        def fastvideo(facts: Facts) -> Run:
            tokens = self.case.tokens
            make = lambda lut, count: rival_kernels.fastvideo(lut, count, tokens)  # noqa: E731
            return rotate(facts, (64, 64), make, -tokens % 64)

        blocks: Facts = {"sparsity": sparsity, "query_block": QUERY_BLOCK, "key_block": KEY_BLOCK}
        yield self._row("thu-ml/SLA (sparse part)", "rival", FORWARD, sla, **blocks)
        yield self._row("FastVideo block-sparse", "rival", FORWARD, fastvideo, **blocks | {"query_block": 64})

    def rows(self, sparsities: list[float]) -> list[Row]:
        """All rows of the case, the most important first."""
        main = sparsities[0]
        rows = [*self.ceilings(), *self.dense(FORWARD)]
        if self.case.rows in ("sparsities", "length"):
            for sparsity in sparsities if self.case.rows == "sparsities" else [main]:
                rows += [self.sparse(FORWARD, sparsity), self.operator(FORWARD, sparsity)]
                rows += [self.operator_with_projection(sparsity)]
            return rows
        rows += [self.sparse(FORWARD, main), self.operator(FORWARD, main), self.operator_with_projection(main)]
        rows += [
            self.operator_on_features(main),
            self.beside(main),
            self.routing(main),
            self.linear(),
            self.sparse(FORWARD, main, (64, 64)),
        ]
        rows += [*self.dense(BOTH), self.sparse(BOTH, main), self.operator(BOTH, main)]
        if self.case.rows == "all":
            rows += [*self.dense(BACKWARD), self.sparse(BACKWARD, main), self.sparse(FORWARD, 0.0), *self.others(main)]
        return rows


def _spec(sparsity: float) -> AttentionSpec:
    return AttentionSpec("topk", density_permille(sparsity), QUERY_BLOCK, KEY_BLOCK, "relu")


# ---------------------------------------------------------------- results


def finish(rows: list[Row]) -> list[Facts]:
    """Rates, shares of the ceilings, and ratios to the best dense row of the same pass in the same comparison."""
    finished = [row.to_json() for row in rows]
    for row in finished:
        if row["error"] and row["error"].startswith(("ModuleNotFoundError", "ImportError")):
            row["error"] = f"{NOT_INSTALLED}: {row['error']}"
    timed = [row for row in finished if "median_ms" in row and not row["error"]]
    peak = next((r["flops"] / r["median_ms"] / 1e9 for r in timed if r["row"].startswith("matmul")), None)
    for row in timed:
        if "flops" in row:
            row["tflops"] = row["flops"] / row["median_ms"] / 1e9
            row["peak_share"] = row["tflops"] / peak if peak else None
        if "bytes" in row:
            row["gigabytes_per_s"] = row["bytes"] / row["median_ms"] / 1e6
        dense = [r for r in timed if r["kind"] == "dense" and r["pass"] == row["pass"]]
        if dense and row["kind"] != "ceiling":
            best = min(dense, key=lambda r: r["median_ms"])
            row["baseline"], row["speedup"] = best["row"], best["median_ms"] / row["median_ms"]
    compare_bursts(finished)
    return finished


def print_table(rows: list[Facts]) -> None:
    """One line per row."""
    print(f"{'row':34}{'sparsity':>9}{'ms':>10}{'10%..90%':>20}{'TFLOP/s':>9}{'peak':>6}{'ratio':>7}{'n':>4}")
    for row in rows:
        asked = f"{row['sparsity']:.2f}" if row.get("sparsity") is not None else ""
        blocks = " 64x64" if row.get("query_block") == 64 and row["kind"] == "salad" else ""
        name = row["row"] + blocks + (f" {row['pass']}" if row["kind"] == "dense" else "")
        if row["error"] or "median_ms" not in row:
            print(f"{name:34}{asked:>9}  {row['error'] or 'not timed'}")
            continue
        timings = f"{row['median_ms']:>10.3f}{row['p10_ms']:>12.3f}..{row['p90_ms']:<6.3f}"
        rate = f"{row['tflops']:>9.0f}" if "tflops" in row else f"{'':>9}"
        share = f"{row['peak_share']:>6.0%}" if row.get("peak_share") else f"{'':>6}"
        ratio = f"{row['speedup']:>6.2f}x" if "speedup" in row else f"{'':>7}"
        burst = f"  burst {row['burst_median_ms']:.3f}" if "burst_median_ms" in row else ""
        burst += f" {row['burst_speedup']:.2f}x" if "burst_speedup" in row else ""
        print(f"{name:34}{asked:>9}{timings}{rate}{share}{ratio}{len(row['timings_ms']):>4}{burst}")


def run_case(case: Case, options: argparse.Namespace, clock: Clock, budget: Budget, results: Results) -> None:
    """Build the inputs, warm every row up, time all in turn, and keep the rows."""
    print(f"\n{case.name}: {case.tokens:,} tokens, {case.heads} heads of {case.head_dim}", flush=True)
    if budget.spent():
        facts = {"row": "all rows", "case": case.name, "kind": "none", "pass": FORWARD, "tokens": case.tokens}
        results.add([facts | {"timings_ms": [], "error": budget.excuse()}])
        print(f"  {budget.excuse()}", flush=True)
        return
    device = torch.device(options.device)
    comparison = Comparison(case, Inputs(case, device, options.seed), compiled=options.compile)
    rows = comparison.rows(options.sparsity)
    for row in rows:
        warm_up(row, clock, budget)
    print(f"  warm after {budget.elapsed():.0f} s", flush=True)
    write = lambda: results.write_sometimes(lambda: finish(rows))  # noqa: E731
    take_both_turns(rows, clock, options.rounds, options.row_seconds, write, rest_s=REST_S)
    finished = finish(rows)
    results.add(finished)
    print_table(finished)
    print(f"  done after {budget.elapsed():.0f} s", flush=True)
    for row in rows:
        row.release()


def wanted_cases(names: list[str]) -> list[Case]:
    """The cases with these names; "length" stands for all lengths."""
    if not names:
        return list(CASES)
    return [case for case in CASES if case.name in names or case.name.split("-")[0] in names]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ", ".join(case.name for case in CASES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--shapes", nargs="+", default=[], metavar="NAME", help=f"any of {known}; length: all of them")
    parser.add_argument(
        "--sparsity",
        nargs="+",
        type=float,
        default=[0.9, 0.8, 0.95, 0.97, 0.5],
        help="the first is used everywhere, the others in the comparison of sparsities (default: %(default)s)",
    )
    parser.add_argument("--rounds", type=int, help="timings of a fast row (default: 50; 2 with --quick)")
    parser.add_argument(
        "--row-seconds", type=float, default=1.5, help="a slow row takes no longer (3 timings at least)"
    )
    parser.add_argument(
        "--budget-seconds", type=float, default=200, help="then no new row starts (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="where the JSON goes (default: benchmarks/results/ on a GPU)")
    parser.add_argument("--quick", action="store_true", help="small sizes, two rounds")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.shapes if not wanted_cases([name])]
    if unknown:
        parser.error(f"unknown shapes {', '.join(unknown)}; known: {known}")
    options.rounds = options.rounds or (2 if options.quick else 50)
    options.compile = options.device == "cuda"  # on a CPU Inductor needs a C++ compiler, and seconds
    return options


def main(arguments: list[str] | None = None) -> None:
    """Run the comparisons, print their tables, keep the rows."""
    options = parse(arguments)
    device, budget = torch.device(options.device), Budget(options.budget_seconds)
    common = describe(device) | {"seed": options.seed, "quick": options.quick, "load": LOADED}
    results = Results(options.output or default_output("attention", device), common)
    print(f"{common['device']}, torch {common['torch']}, Triton {common['triton']}; rows in {results.path}", flush=True)
    # every comparison compiles the operator again, and fullgraph turns a silent fallback into an error
    torch._dynamo.config.recompile_limit = 64
    clock = clock_for(device)
    for case in wanted_cases(options.shapes):
        try:
            run_case(case.quick() if options.quick else case, options, clock, budget, results)
        except Exception as error:  # for example out of memory for the inputs: the next comparison may still fit
            facts = {"row": "all rows", "case": case.name, "kind": "none", "pass": FORWARD, "tokens": case.tokens}
            results.add([facts | {"timings_ms": [], "error": f"{type(error).__name__}: {error}"[:600]}])
            print(f"  {type(error).__name__}: {error}", flush=True)
        free_memory()


if __name__ == "__main__":
    main()
