"""Compile every kernel that ships, for GPUs that need not be there, and refuse what would run badly or not at all.

    python -m salad_compile.kernels.inspect                          # exits 1 if a kernel has a fault
    python -m salad_compile.kernels.inspect --arch 90 --filter "key_gradient bfloat16 d128" --json report.json

The operators' host code runs on meta tensors, so it is the real one that picks tiles and launch settings.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .aot import SHARED_LIMIT, Report, Specialised, compile_report, specialise
from .capability import target_arch
from .launch import Launch, record_launches
from .layout import block_count
from .routing.density import kept_blocks

ARCHS = (80, 90, 100)
BATCH, HEADS, TOKENS = 2, 12, 32760  # Wan 1.3B at 480p; only its divisibility by 16 matters here
KEY_BLOCK = 64
DENSITY_PERMILLE = 100
SCALE = 0.125
EPS = 1e-6


@dataclass(frozen=True)
class Case:
    """One kind of input."""

    dtype: torch.dtype = torch.bfloat16
    head_dim: int = 128
    query_block: int = 128
    mask: bool = False
    feature_map: str = "relu"
    rotated: bool = False
    unaligned: bool = False  # rows begin at odd addresses, as those of a slice may

    def tensor(self) -> torch.Tensor:
        """(B, H, S, D) in (B, S, H, D) memory order, on meta."""
        extra = int(self.unaligned)
        memory = torch.empty((BATCH, TOKENS, HEADS, self.head_dim + extra), dtype=self.dtype, device="meta")
        return memory[..., extra:].transpose(1, 2)

    def mask_tensor(self) -> torch.Tensor | None:
        """bool (B, S) or None."""
        return torch.empty((BATCH, TOKENS), dtype=torch.bool, device="meta") if self.mask else None

    def rotated_tensor(self) -> torch.Tensor | None:
        """Like `tensor`, or None."""
        return self.tensor() if self.rotated else None


def _attention_cases(arch: int) -> Iterator[Case]:
    """Every dtype, head_dim, block size and option at least once, and what asks most of a GPU; most of it on Hopper.

    Aligned tiles may be read as boxes, others are read through pointers: kernels of their own. A mask costs registers;
    fp16 is compiled as bf16 is.
    """
    hardest = functools.partial(Case, mask=True, unaligned=True)
    for head_dim in (64, 128):
        yield Case(torch.bfloat16, head_dim, mask=True)
        yield hardest(torch.bfloat16, head_dim)
    yield Case(torch.bfloat16, 80, mask=True)
    yield hardest(torch.bfloat16, 96)
    yield hardest(torch.float32, 128)
    if arch == 90:
        yield Case(torch.bfloat16, 128)
        yield Case(torch.bfloat16, 128, unaligned=True)
        yield Case(torch.bfloat16, 64, query_block=64)
        yield Case(torch.bfloat16, 128, query_block=64, mask=True)
        yield hardest(torch.bfloat16, 128, query_block=64)
        yield hardest(torch.float16, 128)
        yield Case(torch.float32, 64, mask=True)


def _linear_cases(arch: int) -> Iterator[Case]:
    """As `_attention_cases`; what costs most here is a rotated key beside a mask."""
    full = functools.partial(Case, mask=True, rotated=True)
    yield Case(torch.bfloat16, 64)
    yield full(torch.bfloat16, 96)
    yield full(torch.bfloat16, 128)
    yield full(torch.float32, 128)
    yield Case(torch.bfloat16, 128, feature_map="softmax")
    if arch == 90:
        yield Case(torch.bfloat16, 128)
        yield Case(torch.bfloat16, 80, feature_map="elu")
        yield Case(torch.float16, 128)
        yield Case(torch.float32, 64)


# --- the calls of each operator ---------------------------------------------------------------------------------------

Call = tuple[str, Callable[[], object]]


def routing(arch: int) -> Iterator[Call]:
    """Pooling of every kind of input, and selection, which sees fp32 only."""
    from .routing import cuda

    for case in _attention_cases(arch):
        x, mask = case.tensor(), case.mask_tensor()
        yield _name("pool_blocks", case), functools.partial(cuda.pool_blocks, x, case.query_block, mask)
    for case in (Case(torch.float32, mask=mask) for mask in (False, True)):
        pooled_query, pooled_key = (
            torch.empty((BATCH, HEADS, block_count(TOKENS, block), 128), device="meta")
            for block in (case.query_block, KEY_BLOCK)
        )
        settings = (case.query_block, KEY_BLOCK, DENSITY_PERMILLE, 0, 512, case.mask_tensor())
        yield _name("select_blocks", case), functools.partial(cuda.select_blocks, pooled_query, pooled_key, *settings)
        now = torch.empty((), dtype=torch.int32, device="meta")
        adjustable = functools.partial(cuda.select_blocks, pooled_query, pooled_key, *settings, now)
        yield _name("select_blocks permille", case), adjustable


def linear(arch: int) -> Iterator[Call]:
    """State and output, forward and backward."""
    from .linear import cuda

    for case in _linear_cases(arch):
        x, mask, rotated, phi = case.tensor(), case.mask_tensor(), case.rotated_tensor(), case.feature_map
        state = torch.empty((BATCH, HEADS, case.head_dim, case.head_dim), device="meta")
        key_sum = torch.empty((BATCH, HEADS, case.head_dim), device="meta")
        yield _name("state", case), functools.partial(cuda.linear_state, x, x, phi, mask, rotated)
        of_state = functools.partial(cuda.linear_state_backward, state, key_sum, x, x, phi, mask, rotated)
        yield _name("state_backward", case), of_state
        yield _name("output", case), functools.partial(cuda.linear_output, x, state, key_sum, phi, EPS, rotated)
        of_output = functools.partial(cuda.linear_output_backward, x, x, state, key_sum, phi, EPS, rotated)
        yield _name("output_backward", case), of_output


def block_sparse(arch: int) -> Iterator[Call]:
    """Attention over selected blocks, forward and backward."""
    from .block_sparse import cuda

    for case in _attention_cases(arch):
        x, query_blocks = case.tensor(), block_count(TOKENS, case.query_block)
        keep = kept_blocks(block_count(TOKENS, KEY_BLOCK), case.query_block, KEY_BLOCK, DENSITY_PERMILLE)
        lut = torch.empty((BATCH, HEADS, query_blocks, keep), dtype=torch.int32, device="meta")
        selection = (lut, lut[..., 0], case.query_block, KEY_BLOCK, SCALE, case.mask_tensor())
        lse = torch.empty((BATCH, HEADS, TOKENS), device="meta")
        yield _name("forward", case), functools.partial(cuda.forward, x, x, x, *selection)
        yield _name("backward", case), functools.partial(cuda.backward, x, x, x, x, x, lse, *selection)


OPERATORS: dict[str, Callable[[int], Iterator[Call]]] = {
    "routing": routing,
    "linear": linear,
    "block_sparse": block_sparse,
}


def _name(function: str, case: Case) -> str:
    options = [name for name in ("mask", "rotated", "unaligned") if getattr(case, name)]
    if case.feature_map != "relu":
        options.append(case.feature_map)
    dtype = str(case.dtype).removeprefix("torch.")
    return " ".join([function, dtype, f"d{case.head_dim}", f"{case.query_block}x{KEY_BLOCK}", *options])


# --- recording and compiling ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One kernel to compile: its name, the call that launches it, its settings in words."""

    kernel: str
    call: str
    settings: str
    source: Specialised

    @property
    def title(self) -> str:
        """What `--filter` looks at, and faults are reported with."""
        return f"{self.kernel} {self.call} sm_{self.source.arch} {self.settings}"


@dataclass(frozen=True)
class Result:
    """A compiled kernel, or the error that compiling it ended with."""

    job: Job
    report: Report | None
    error: str = ""

    @property
    def faults(self) -> list[str]:
        """Why it must not ship."""
        return [self.error] if self.report is None else self.report.faults()

    def to_dict(self) -> dict[str, object]:
        """As JSON can hold it."""
        numbers = {} if self.report is None else dataclasses.asdict(self.report)
        names = {"kernel": self.job.kernel, "call": self.job.call, "settings": self.job.settings}
        return names | {"arch": self.job.source.arch} | numbers | {"faults": self.faults}


def record_jobs(archs: Sequence[int]) -> list[Job]:
    """Every kernel that the operators launch on these GPUs; calls that launch the same machine code are one job."""
    jobs: dict[str, Job] = {}
    for arch, (operator, calls) in itertools.product(archs, OPERATORS.items()):
        with target_arch(divmod(arch, 10)):
            for name, call in calls(arch):
                with record_launches() as launches:
                    call()
                for launch in launches:
                    job = _job(operator, name, launch, arch)
                    jobs.setdefault(job.source.identity, job)
    return list(jobs.values())


def _job(operator: str, call: str, launch: Launch, arch: int) -> Job:
    tiles = [f"{name[5:]}{size}" for name, size in launch.constants.items() if name.startswith("TILE_")]
    options = [f"{name.removeprefix('num_')} {value}" for name, value in launch.options.items()]
    kernel = f"{operator}.{launch.kernel.__name__.removesuffix('_kernel')}"
    return Job(kernel, call, " ".join(tiles + options), specialise(launch, arch))


def compile_jobs(jobs: Sequence[Job], workers: int, done: Callable[[], object] = lambda: None) -> list[Result]:
    """Compile in `workers` processes, calling `done` after each kernel. The results come in the order of the jobs."""
    # forked, because kernels cannot be pickled; nothing was compiled and no thread was started before
    with concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("fork"), initializer=_inherit, initargs=(jobs,)
    ) as pool:
        pending = [pool.submit(_compile_inherited, index) for index in range(len(jobs))]
        for _ in concurrent.futures.as_completed(pending):
            done()
    return [_result(job, future) for job, future in zip(jobs, pending, strict=True)]


def _result(job: Job, future: concurrent.futures.Future[Report | str]) -> Result:
    error = future.exception()
    if error is not None:
        return Result(job, None, f"the compiler died on this kernel, or on one beside it: {error}")
    outcome = future.result()
    return Result(job, None, outcome) if isinstance(outcome, str) else Result(job, outcome)


_inherited: Sequence[Job] = ()


def _inherit(jobs: Sequence[Job]) -> None:
    global _inherited
    _inherited = jobs


def _compile_inherited(index: int) -> Report | str:
    try:
        return compile_report(_inherited[index].source)
    except Exception as error:  # the errors of a compiler: not all of them can be sent to another process
        return f"does not compile: {type(error).__name__}: {error}"


# --- the command ------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns 0, 1 if a kernel has a fault, or 2 if nothing matches the filter."""
    parser = argparse.ArgumentParser(prog="python -m salad_compile.kernels.inspect", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHS, choices=SHARED_LIMIT, help="compute capabilities")
    parser.add_argument("--filter", default="", metavar="TEXT", help="only kernels whose line has all of these words")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there as well")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (all cores)")
    options = parser.parse_args(arguments)

    start = time.perf_counter()
    jobs = [job for job in record_jobs(options.arch) if all(word in job.title for word in options.filter.split())]
    if not jobs:
        print(f"no kernel matches {options.filter!r}", file=sys.stderr)
        return 2
    results = _compile_with_progress(jobs, options.workers)
    if options.json is not None:
        options.json.write_text(json.dumps([result.to_dict() for result in results], indent=1), encoding="utf-8")
    _print_table(results)
    faulty = [result for result in results if result.faults]
    print(f"{len(results)} kernels in {time.perf_counter() - start:.0f} s, {len(faulty)} with faults")
    for result in faulty:
        print(f"FAULT {result.job.title}: {'; '.join(result.faults)}")
    return 1 if faulty else 0


def _compile_with_progress(jobs: Sequence[Job], workers: int) -> list[Result]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

    columns = ("compiling", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # no refresh thread: the workers are forked below
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False, transient=True) as progress:
        task = progress.add_task("compiling", total=len(jobs))

        def advance() -> None:
            progress.advance(task)
            progress.refresh()

        return compile_jobs(jobs, workers, advance)


def _print_table(results: Sequence[Result]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title="kernels", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("kernel", "call", "settings"):
        table.add_column(column, overflow="fold")
    for column in ("sm", "registers", "spilled B", "shared B", "wgmma", "TMA"):
        table.add_column(column, justify="right")
    for result in results:
        report = result.report
        numbers = ["-"] * 5
        if report is not None:
            numbers = [str(n) for n in (report.registers, report.spill_bytes, report.shared, report.wgmma, report.tma)]
        job, style = result.job, "red" if result.faults else None
        table.add_row(job.kernel, job.call, job.settings, str(job.source.arch), *numbers, style=style)
    # a log file has no width, and 80 columns are too few
    Console(width=None if sys.stdout.isatty() else 160).print(table)


if __name__ == "__main__":
    sys.exit(main())
