"""One process of `rivals.py`: it builds, checks and times the rows of one package, and answers the parent.

A kernel that hangs or takes its process down takes nothing else with it: the parent ends the process and goes on.

    parent                                     answers
    ("prepare", shape, [row, ...])             for each row ("begin", row), then ("ready", row, facts) or
                                               ("failed", row, reason); at the end ("done",)
    ("heat", seconds)                          ("done",)
    ("time", row, number, repeats)             ("times", [milliseconds, ...]) or ("failed", row, reason)
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from common import LOAD, NOT_INSTALLED, PRODUCT_MS, PRODUCTS, CpuClock, Facts, clock_for, free_memory
from rival_inputs import BOTH, FORWARD, Inputs, Shape, forward_error, gradient_error
from rival_kernels import Kernel, Run, kernels, version_of


@dataclass
class Prepared:
    """A row that can be timed, and how many products hide its launch."""

    run: Run
    products: int = PRODUCTS


class Load:
    """Products that keep the GPU busy, so that its clocks are those of a long run; nothing on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.square = torch.randn(LOAD, LOAD, device=device, dtype=torch.bfloat16) if device.type == "cuda" else None

    def __call__(self, products: int) -> None:
        """Queue so many."""
        if self.square is not None:
            for _ in range(products):
                self.square @ self.square

    def heat(self, seconds: float) -> None:
        """Keep the GPU busy for so long."""
        end = time.perf_counter() + seconds
        while self.square is not None and time.perf_counter() < end:
            self(100)
            torch.cuda.synchronize()


class Bench:
    """The rows of one process."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.clock, self.load = device, clock_for(device), Load(device)
        self.known = {kernel.row: kernel for kernel in kernels()}
        self.inputs: Inputs | None = None
        self.prepared: dict[str, Prepared] = {}

    def begin(self, shape: Shape, *, contiguous: bool) -> None:
        """Make the inputs of a shape, unless they are there."""
        if self.inputs is None or (self.inputs.shape, self.inputs.contiguous) != (shape, contiguous):
            self.prepared, self.inputs = {}, None
            free_memory()
            self.inputs = Inputs(shape, self.device, contiguous=contiguous)

    def prepare(self, shape: Shape, row: str) -> Facts:
        """Build, compile and check a row. Raises ArithmeticError if its result is wrong."""
        kernel, start = self.known[row], time.perf_counter()
        self.begin(shape, contiguous=kernel.contiguous)
        assert self.inputs is not None
        run = kernel.build(self.inputs)
        result = run(0)
        self.clock.synchronize()
        facts: Facts = {"prepared_s": round(time.perf_counter() - start, 2), "version": version_of(kernel.distribution)}
        if kernel.kind != "ceiling":
            facts["relative_error"] = self._check(kernel, result)
            pairs = self.inputs.pairs(kernel.blocks)
            facts["measured_sparsity"] = 1 - pairs / self.inputs.pairs(None)
            facts["flops"] = 4.0 * pairs * shape.head_dim * {FORWARD: 1.0, BOTH: 3.5}[kernel.step]
        else:
            facts["flops"] = 2.0 * result[0].shape[0] ** 3
        del result
        self.prepared[row] = Prepared(run)
        facts["estimate_ms"], facts["host_ms"] = self._estimate(run)
        self.prepared[row].products = max(PRODUCTS, int(1.5 * facts["host_ms"] / PRODUCT_MS) + 1)
        free_memory()
        return facts

    def _check(self, kernel: Kernel, result: tuple[torch.Tensor, ...]) -> float:
        assert self.inputs is not None
        if kernel.step == BOTH:
            query, key, value = result
            error = gradient_error((query, key, value), self.inputs, kernel.blocks)
        else:
            error = forward_error(result[0], self.inputs, kernel.blocks)
        if not error <= kernel.tolerance:  # NaN is not
            raise ArithmeticError(
                f"wrong: relative error {error:.1e} to float64, at most {kernel.tolerance:.0e} is right"
            )
        return error

    def _estimate(self, run: Run) -> tuple[float, float]:
        """Milliseconds of one call, and how many the host takes to queue it."""
        queued = []

        def call() -> None:
            start = time.perf_counter()
            run(1)
            queued.append((time.perf_counter() - start) * 1e3)

        return self.clock.milliseconds(call), queued[0]

    def time(self, row: str, number: int, repeats: int) -> list[float]:
        """Milliseconds of several calls, one after the other under load."""
        prepared = self.prepared[row]
        if isinstance(self.clock, CpuClock):
            return [self.clock.milliseconds(lambda n=n: prepared.run(number + n)) for n in range(repeats)]
        events = []
        for repeat in range(repeats):  # nothing waits in between: the GPU stays busy
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.load(prepared.products)
            start.record()
            kept = prepared.run(number + repeat)
            end.record()
            del kept
            events.append((start, end))
        torch.cuda.synchronize()
        return [float(start.elapsed_time(end)) for start, end in events]


def why(error: BaseException) -> str:
    """The reason of a row without a timing."""
    text = f"{type(error).__name__}: {error}"[:600]
    return f"{NOT_INSTALLED}: {text}" if isinstance(error, ImportError) else text


def answer(bench: Bench, connection: Connection, command: tuple[Any, ...]) -> None:
    """Do what a command says."""
    match command:
        case ("prepare", shape, rows):
            for row in rows:
                connection.send(("begin", row))
                try:
                    connection.send(("ready", row, bench.prepare(shape, row)))
                except Exception as error:  # a row that fails is a result, and must not stop the others
                    connection.send(("failed", row, why(error)))
                    free_memory()
            connection.send(("done",))
        case ("heat", seconds):
            bench.load.heat(seconds)
            connection.send(("done",))
        case ("time", row, number, repeats):
            try:
                connection.send(("times", bench.time(row, number, repeats)))
            except Exception as error:
                connection.send(("failed", row, why(error)))


def serve(connection: Connection, device: str) -> None:
    """The process: answer until the parent closes the connection."""
    bench = Bench(torch.device(device))
    while True:
        try:
            command = connection.recv()
        except EOFError:
            return
        answer(bench, connection, command)
