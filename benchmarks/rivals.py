"""Attention kernels of several projects beside ours, in one run on one GPU and on the same selections.

    python benchmarks/rivals.py                                   everything; rows go to benchmarks/results/
    python benchmarks/rivals.py --only 128x64 --shapes 12x32768   rows whose name has the text, one shape
    python benchmarks/rivals.py --quick --device cpu              small sizes: checks that it runs

tools/pack_rivals.sh brings the packages to a machine without a registry; a row whose package is not there gives the
reason. Each package has a process of its own and each row a time limit, so that a kernel that hangs costs one row. All
processes share the GPU, one at work at a time: rows are timed in turn across the processes, round after round, in an
order that is drawn anew, so that the state of a power-capped GPU hits all of them alike. Ten products of 4096^3 run
ahead of every timing, which hide the launch and keep the GPU as busy as a model does. Every row is checked against
float64 in a few query blocks and heads before it is timed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
from common import FEWEST, Budget, Facts, Results, default_output, describe, spread
from rival_inputs import INPUTS, PERMILLE, Shape
from rival_kernels import Kernel, kernels
from rival_process import serve

SHAPES = (Shape(12, 32_768), Shape(40, 75_520))
QUICK = Shape(2, 1_024, 32)
FAST_MS, REPEATS = 10.0, 3  # a turn of a row below this has so many timings
HEAT_S = 3.0  # of products before the first round
HANGS = "hangs"


@dataclass
class Row:
    """One kernel at one shape."""

    kernel: Kernel
    shape: Shape
    facts: Facts = field(default_factory=dict)
    milliseconds: list[float] = field(default_factory=list)
    error: str | None = "left out: not prepared"

    @property
    def repeats(self) -> int:
        """Timings in one turn."""
        return REPEATS if self.facts["estimate_ms"] < FAST_MS else 1

    def due(self, number: int, rounds: int, row_seconds: float) -> bool:
        """Whether it has a turn in this round: slow rows have fewer, evenly spread."""
        affordable = int(row_seconds * 1e3 / (self.facts["estimate_ms"] * self.repeats + 1e-6))
        turns = min(rounds, max(FEWEST, affordable))
        return (number + 1) * turns // rounds > number * turns // rounds

    def to_json(self) -> Facts:
        """The row, without comparisons with other rows."""
        kernel, shape = self.kernel, self.shape
        query_block, key_block = kernel.blocks or (None, None)
        about: Facts = {"row": kernel.name, "case": shape.name, "kind": kernel.kind, "pass": kernel.step, "batch": 1}
        about |= {"heads": shape.heads, "tokens": shape.tokens, "head_dim": shape.head_dim, "process": kernel.process}
        about |= {"query_block": query_block, "key_block": key_block, "contiguous": kernel.contiguous}
        timed = spread(self.milliseconds) if self.milliseconds else {}
        return (
            about | self.facts | timed | {"timings_ms": [round(ms, 4) for ms in self.milliseconds], "error": self.error}
        )


class Gone(Exception):
    """A process that was ended, or ended by itself."""


class Child:
    """A process of `rival_process.serve`, and the rows it has to do."""

    def __init__(self, name: str, device: str, target: Callable[..., None] = serve, method: str = "spawn") -> None:
        self.name, self._device, self._target = name, device, target
        self._context: Any = multiprocessing.get_context(method)
        self.process: Any = None

    def start(self) -> None:
        """Start it, unless it runs."""
        if self.process is None:
            self.connection, theirs = self._context.Pipe()
            self.process = self._context.Process(target=self._target, args=(theirs, self._device), daemon=True)
            self.process.start()
            theirs.close()

    def end(self) -> str:
        """Kill it, if it is there, and say how it ended."""
        if self.process is None:
            return ""
        code = self.process.exitcode
        self.process.kill()
        self.process.join()
        self.connection.close()
        self.process = None
        return "" if code is None else f" (exit code {code})"

    def send(self, command: tuple[Any, ...]) -> None:
        """Send a command. Raises Gone if nobody is there."""
        try:
            self.connection.send(command)
        except OSError as error:
            raise Gone("its process ended" + self.end()) from error

    def receive(self, seconds: float) -> tuple[Any, ...]:
        """The next answer. Raises Gone if there is none in time, or the process ended."""
        if not self.connection.poll(max(seconds, 0)):
            self.end()
            raise Gone(f"{HANGS}: no answer in {seconds:.0f} s, its process was killed")
        try:
            answer: tuple[Any, ...] = self.connection.recv()
        except (EOFError, OSError) as error:
            self.process.join(5)  # for the exit code
            raise Gone("its process ended" + self.end()) from error
        return answer


# ---------------------------------------------------------------- preparing


class Preparation:
    """All processes prepare their rows at the same time, because compiling takes one core each.

    Args:
        limit: seconds for one row, with what its process imports before the first.
        changed: called after every row that is ready or failed.
    """

    def __init__(self, shape: Shape, limit: float, changed: Callable[[], None]) -> None:
        self.shape, self.limit, self.changed = shape, limit, changed
        self.left: dict[Child, list[Row]] = {}
        self.ready: dict[Child, list[Row]] = {}
        self.deadlines: dict[Child, float] = {}

    def begin(self, child: Child, rows: Sequence[Row]) -> None:
        """Have a child prepare these rows, one after the other."""
        self.left[child], self.ready[child] = list(rows), []
        self.deadlines[child] = time.perf_counter() + self.limit
        child.start()
        try:
            child.send(("prepare", self.shape, [row.kernel.row for row in rows]))
        except Gone as gone:
            self._lose(child, str(gone))

    def run(self, budget: Budget) -> None:
        """Until every row is ready or has a reason."""
        while self.left and not budget.spent():
            wait = min(self.deadlines.values()) - time.perf_counter()
            answered = connection.wait([child.connection for child in self.left], min(max(wait, 0.0), 0.2))
            for child in list(self.left):
                try:
                    if child.connection in answered:
                        self._take(child, child.receive(self.limit))
                    elif time.perf_counter() > self.deadlines[child]:
                        child.end()
                        raise Gone(f"{HANGS}: not ready in {self.limit:.0f} s, its process was killed")
                except Gone as gone:
                    self._lose(child, str(gone))
        for child, rows in self.left.items():
            child.end()
            for row in (*rows, *self.ready[child]):
                row.error = budget.excuse()

    def _take(self, child: Child, answer: tuple[Any, ...]) -> None:
        self.deadlines[child] = time.perf_counter() + self.limit
        match answer:
            case ("ready", _, facts):
                row = self.left[child].pop(0)
                row.facts, row.error = facts, None
                self.ready[child].append(row)
                self.changed()
            case ("failed", _, reason):
                self.left[child].pop(0).error = reason
                self.changed()
            case ("done",):
                del self.left[child], self.deadlines[child]

    def _lose(self, child: Child, reason: str) -> None:
        """The row at work loses its process; the others, also those that were ready, begin in a new one."""
        failed, *others = self.left.pop(child)
        del self.deadlines[child]
        failed.error = reason
        self.changed()
        if again := [*self.ready[child], *others]:
            self.begin(child, again)


# ---------------------------------------------------------------- timing


class Timing:
    """Rounds over all rows that are ready."""

    def __init__(self, rows: dict[Child, list[Row]], limit: float) -> None:
        self.limit = limit
        self.turns = [(child, row) for child, children_rows in rows.items() for row in children_rows if not row.error]
        self._dice = random.Random(0)

    def heat(self) -> None:
        """Bring the GPU to the clocks of a long run."""
        for child in {child for child, _ in self.turns}:
            try:
                child.send(("heat", HEAT_S))
                child.receive(self.limit)
            except Gone as gone:
                self._lose(child, str(gone))
                continue
            return

    def run(self, rounds: int, row_seconds: float, budget: Budget, changed: Callable[[], None]) -> None:
        """Time every row in turn, in an order drawn anew each round."""
        for number in range(rounds):
            self._dice.shuffle(self.turns)
            for child, row in list(self.turns):
                if budget.spent():
                    break
                if row.error is None and child.process is not None and row.due(number, rounds, row_seconds):
                    self._turn(child, row, number)
            changed()
        for _, row in self.turns:
            if row.error is None and len(row.milliseconds) < FEWEST:
                row.error = budget.excuse()

    def _turn(self, child: Child, row: Row, number: int) -> None:
        try:
            child.send(("time", row.kernel.row, number * REPEATS, row.repeats))
            kind, *answer = child.receive(self.limit)
        except Gone as gone:
            row.error = str(gone)
            self._lose(child, f"its process was lost with {row.kernel.row}: {gone}")
            return
        if kind == "times":
            row.milliseconds += answer[0]
        else:
            row.error = answer[-1]

    def _lose(self, child: Child, reason: str) -> None:
        """Rows of a lost process keep what was timed, if that is enough."""
        for other, row in self.turns:
            if other is child and row.error is None:
                row.facts["stopped"] = reason
                if len(row.milliseconds) < FEWEST:
                    row.error = reason


# ---------------------------------------------------------------- results


def finish(rows: Sequence[Row]) -> list[Facts]:
    """Rates, and ratios to the best dense row and to every block-sparse rival of the same pass and shape."""
    finished = [row.to_json() for row in rows]
    timed = [row for row in finished if "median_ms" in row and not row["error"]]
    for row in timed:
        row["tflops"] = row["flops"] / row["median_ms"] / 1e9
    for row in timed:
        alike = [other for other in timed if (other["pass"], other["case"]) == (row["pass"], row["case"])]
        dense = [other for other in alike if other["kind"] == "dense"]
        if dense and row["kind"] != "ceiling":
            best = min(dense, key=lambda other: float(other["median_ms"]))
            row["baseline"], row["speedup"] = best["row"], best["median_ms"] / row["median_ms"]
        if row["kind"] == "salad":
            rivals = [other for other in alike if other["kind"] == "rival"]
            row["rate_over"] = {other["row"]: round(row["tflops"] / other["tflops"], 4) for other in rivals}
    return finished


def print_table(rows: list[Facts]) -> None:
    """One line per row."""
    for row in rows:
        name = f"{row['row']} {row['pass']}" if row["kind"] != "ceiling" else row["row"]
        if row["error"]:
            print(f"{name:60}{row['error']}")
            continue
        error = f"error {row['relative_error']:.1e}" if "relative_error" in row else ""
        ratio = f"{row['speedup']:5.2f}x dense" if "speedup" in row else ""
        timings = f"{row['median_ms']:9.3f} ms ({row['p10_ms']:.3f} to {row['p90_ms']:.3f}, n {len(row['timings_ms'])})"
        print(f"{name:60}{timings:42}{row['tflops']:6.0f} TFLOP/s {ratio:12} {error}")
    for row in rows:
        if row.get("rate_over"):
            ratios = ", ".join(f"{ratio:.2f}x {name}" for name, ratio in row["rate_over"].items())
            print(f"  {row['row']} {row['pass']}, rate over: {ratios}")


def run_shape(
    shape: Shape,
    children: dict[str, Child],
    options: argparse.Namespace,
    budget: Budget,
    results: Results,
    hung: dict[str, str],
) -> None:
    """Prepare and time the rows of a shape, and keep them as they come.

    Args:
        hung: rows that are not tried again, with the shape at which they hung; this shape's are added.
    """
    print(f"\n{shape.name}: {shape.tokens:,} tokens, {shape.heads} heads of {shape.head_dim}", flush=True)
    rows = [Row(kernel, shape) for kernel in kernels() if options.only in kernel.row]
    for row in rows:  # a second wait would not end otherwise
        if row.kernel.row in hung:
            row.error = f"left out: it hung at {hung[row.kernel.row]}"
    of_child = {
        child: [row for row in rows if row.kernel.process == name and row.kernel.row not in hung]
        for name, child in children.items()
    }

    def changed() -> None:
        results.write(finish(rows))

    preparation = Preparation(shape, options.row_seconds, changed)
    for child, wanted in of_child.items():
        if wanted:
            preparation.begin(child, wanted)
    preparation.run(budget)
    print(f"  ready after {budget.elapsed():.0f} s", flush=True)
    timing = Timing(of_child, options.turn_seconds)
    timing.heat()
    timing.run(options.rounds, options.timed_seconds, budget, changed)
    hung |= {row.kernel.row: shape.name for row in rows if (row.error or "").startswith(HANGS)}
    finished = finish(rows)
    results.add(finished)
    print_table(finished)
    print(f"  done after {budget.elapsed():.0f} s", flush=True)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    shapes = [shape.name for shape in SHAPES]
    parser.add_argument("--shapes", nargs="+", default=shapes, metavar="HxS", help="heads x tokens (default: both)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only rows whose name has this text")
    parser.add_argument("--rounds", type=int, help="turns of a row (default: 10; 2 with --quick)")
    parser.add_argument(
        "--timed-seconds", type=float, default=2.0, help="a slow row takes no longer (3 turns at least)"
    )
    parser.add_argument("--row-seconds", type=float, default=100.0, help="a row that is not ready by then hangs")
    parser.add_argument("--turn-seconds", type=float, default=20.0, help="a turn that is not over by then hangs")
    parser.add_argument("--budget-seconds", type=float, default=270.0, help="then nothing new starts")
    parser.add_argument("--output", type=Path, help="where the JSON goes (default: benchmarks/results/ on a GPU)")
    parser.add_argument("--quick", action="store_true", help="a small shape, two rounds")
    options = parser.parse_args(arguments)
    try:
        options.shapes = [Shape(*map(int, name.split("x"))) for name in options.shapes]
    except (TypeError, ValueError):
        parser.error("shapes are heads x tokens, such as 12x32768")
    if not any(options.only in kernel.row for kernel in kernels()):
        parser.error(f"no row has {options.only!r} in its name; rows: {', '.join(k.row for k in kernels())}")
    options.shapes = [QUICK] if options.quick else options.shapes
    options.rounds = options.rounds or (2 if options.quick else 10)
    return options


def main(arguments: list[str] | None = None) -> None:
    """Time all shapes, print their tables, keep the rows."""
    options = parse(arguments)
    budget = Budget(options.budget_seconds)
    device = torch.device(options.device)
    common = describe(device) | {"permille": PERMILLE, "inputs": INPUTS, "quick": options.quick}
    common |= {"dtype": "bfloat16" if device.type == "cuda" else "float32"}
    results = Results(options.output or default_output("rivals", device), common)
    print(f"{common['device']}, torch {common['torch']}, Triton {common['triton']}; rows in {results.path}", flush=True)
    wanted = [kernel.process for kernel in kernels() if options.only in kernel.row]
    children = {name: Child(name, options.device) for name in dict.fromkeys(wanted)}
    hung: dict[str, str] = {}
    try:
        for shape in options.shapes:
            run_shape(shape, children, options, budget, results, hung)
    finally:
        for child in children.values():
            child.end()


if __name__ == "__main__":
    main()
