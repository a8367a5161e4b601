"""Compile every kernel that ships, for GPUs that need not be there, and refuse what would run badly or not at all.

    python -m salad_compile.kernels.inspect                          # exits 1 if a kernel has a fault
    python -m salad_compile.kernels.inspect --arch 90 --filter "key_gradient bfloat16 d128" --json report.json
    python -m salad_compile.kernels.inspect --record tools/compiled_kernels.json       # and write down which are sound
    python -m salad_compile.kernels.inspect --compiled tools/compiled_kernels.json     # only those that are not in it

Every engine lists the calls that launch all that it ships. Its host code runs on meta tensors, so it is the real one
that picks tiles and launch settings.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .aot import SHARED_LIMIT, Report, Specialised, compile_report, specialise
from .capability import target_arch
from .compiled import Record, compiler, fingerprint
from .engines import FOLDERS, engines
from .errors import KernelRecordError, UnsupportedKernelError
from .launch import Launch, record_launches

ARCHS = (80, 90, 100)


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
    """Every kernel that the engines launch on these GPUs; calls that launch the same machine code are one job.

    Raises:
        UnsupportedKernelError: an engine lists a call that it does not support.
    """
    jobs: dict[str, Job] = {}
    for arch, engine in itertools.product(archs, engines()):
        with target_arch(divmod(arch, 10)), record_launches() as launches:
            for call, name, arguments in engine.gate_calls(arch):
                reason = engine.supports(call)
                if reason is not None:
                    raise UnsupportedKernelError(f"the gate of engine {engine.name!r} lists {name}: {reason}")
                engine.run(call, *arguments)
                for launch in launches:
                    job = _job(FOLDERS[call.operator], name, launch, arch)
                    jobs.setdefault(job.source.identity, job)
                launches.clear()
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
    parser.add_argument(
        "--filter",
        nargs="+",
        default=[""],
        metavar="TEXT",
        help="only kernels whose line has all words of one text; !WORD in it: but not this one",
    )
    parser.add_argument("--without", nargs="+", default=[], metavar="WORD", help="no kernels whose line has the word")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there as well")
    parser.add_argument("--record", type=Path, metavar="FILE", help="write down there which kernels have no fault")
    parser.add_argument(
        "--compiled",
        type=Path,
        metavar="FILE",
        help="a record: kernels in it are not compiled again, all others are, whatever --filter and --without choose; "
        "but those that choose are compiled where another compiler made the record",
    )
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (all cores)")
    options = parser.parse_args(arguments)

    start = time.perf_counter()
    try:
        record = None if options.compiled is None else Record.read(options.compiled)
    except KernelRecordError as error:
        print(error, file=sys.stderr)
        return 2
    every = record_jobs(options.arch)
    jobs = [job for job in every if _is_chosen(job.title, options.filter, options.without)]
    if not jobs:
        without = f" without {' '.join(options.without)}" if options.without else ""
        print(f"no kernel matches {' or '.join(map(repr, options.filter))}{without}", file=sys.stderr)
        return 2
    if record is not None:
        jobs = _left_to_compile(every, jobs, record)
    results = _compile_with_progress(jobs, options.workers) if jobs else []
    if options.json is not None:
        options.json.write_text(json.dumps([result.to_dict() for result in results], indent=1), encoding="utf-8")
    if options.record is not None:
        _write_record(every, results, record, options.record)
    if results:
        _print_table(results)
    faulty = [result for result in results if result.faults]
    print(f"{len(results)} kernels in {time.perf_counter() - start:.0f} s, {len(faulty)} with faults")
    for result in faulty:
        print(f"FAULT {result.job.title}: {'; '.join(result.faults)}")
    return 1 if faulty else 0


def _left_to_compile(every: Sequence[Job], chosen: Sequence[Job], record: Record) -> list[Job]:
    """What is not in a record; of GPUs for which another compiler made it, what is chosen."""
    left = []
    for arch in sorted({job.source.arch for job in every}):
        mine = [job for job in every if job.source.arch == arch]
        if record.is_of_this_compiler(arch):
            new = [job for job in mine if not record.has(job.source)]
            print(f"sm_{arch}: {len(mine) - len(new)} of {len(mine)} kernels are as they were when they last compiled")
        else:
            new = [job for job in chosen if job.source.arch == arch]
            other = record.compilers.get(arch, "nothing")
            print(f"sm_{arch}: the record was made by {other}, and here is {compiler(arch)}")
        left += new
    return left


def _write_record(every: Sequence[Job], results: Sequence[Result], known: Record | None, path: Path) -> None:
    """What compiled now without fault; and what is in the record that was asked, and still ships."""
    archs = {job.source.arch for job in every}
    jobs = [] if known is None else [job for job in every if known.has(job.source)]
    jobs += [result.job for result in results if not result.faults]
    record = Record(
        {arch: compiler(arch) for arch in sorted(archs)}, {fingerprint(job.source): job.title for job in jobs}
    )
    record.write(path)


def _is_chosen(title: str, texts: Sequence[str], without: Sequence[str]) -> bool:
    """Whether a text suits the title, and none of `without` is a word of it."""
    return any(_suits(title, text) for text in texts) and not set(without) & set(title.split())


def _suits(title: str, text: str) -> bool:
    """Whether all words of the text are somewhere in the title; but what follows a ! is no word of it."""
    words = text.split()
    refused = {word[1:] for word in words if word.startswith("!")}
    wanted = [word for word in words if not word.startswith("!")]
    return all(word in title for word in wanted) and not refused & set(title.split())


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
