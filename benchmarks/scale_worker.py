"""One of the processes of a case of scale.py: builds the models, times them with the others, and writes rows if first.

Started by scale.py with a plan and with the variables that torchrun sets. Not for use by hand.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from common import HEAT_S, Clock, Facts, clock_for, free_memory, spread
from dense_kernels import PACKAGES, attend, fastest, preferring, self_attention_on, time_dense
from torch import Tensor
from transformer import FORWARD, Model, Wan, build, convert, make_inputs, share

import salad_compile
from salad_compile.definition import attention
from salad_compile.kernels import measure_executions
from salad_compile.sites.branch import branches

FEWEST = 2  # timings of a slow row
LEARNING_RATE = 1e-5
# names of kernels and of gloo's operations, in a profile
EXCHANGES = {"cuda": "nccl", "cpu": "gloo:"}

Call = Callable[[], Any]


class Worker:
    """This process's part of a case."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan = plan
        self.rank, self.degree = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        cuda = plan["device"] == "cuda"
        self.device = torch.device("cuda", self.rank) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        limit = timedelta(seconds=max(30.0, plan["seconds"]))
        dist.init_process_group(
            "nccl" if cuda else "gloo", timeout=limit, **({"device_id": self.device} if cuda else {})
        )
        self.model = Model(**(plan["model"] | {"latent": tuple(plan["model"]["latent"])}))
        self.dtype = torch.bfloat16 if cuda else torch.float32
        self.clock: Clock = clock_for(self.device)
        self.inputs = make_inputs(self.model, self.device, self.dtype)
        self.folder = Path(plan["folder"])
        self.dense_times: dict[str, float] = {}
        self.rows: dict[str, Facts] = {kind: {} for kind in plan["kinds"]}

    # ------------------------------------------------------------ all processes together

    def slowest(self, value: float) -> float:
        """The greatest of what the processes give."""
        return self._reduced(value, dist.ReduceOp.MAX)

    def quickest(self, value: float) -> float:
        """The least of it."""
        return self._reduced(value, dist.ReduceOp.MIN)

    def mean(self, value: float) -> float:
        """Their mean."""
        return self._reduced(value, dist.ReduceOp.SUM) / self.degree

    def _reduced(self, value: float, operation: Any) -> float:
        tensor = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, operation)
        return float(tensor)

    def write(self) -> None:
        """The rows as they are; the first process alone."""
        if self.rank == 0:
            temporary = self.folder / "rows.writing"
            temporary.write_text(json.dumps(self.rows))
            temporary.replace(self.folder / "rows.json")

    # ------------------------------------------------------------ the case

    def run(self) -> None:
        """Prepare all kinds, time them in turn."""
        base = build(self.model, self.device, self.dtype)
        if self.plan["step"] == FORWARD:
            self.dense_times = self._time_dense()
        calls = {}
        for kind in self.plan["kinds"]:
            prepare = self._prepare(kind)
            try:
                calls[kind] = self._warm_up(kind, prepare(base, kind))
            except Exception as error:  # the same in all processes, or the others wait until the time is up
                self.rows[kind]["error"] = f"{type(error).__name__}: {error}"[:600]
                free_memory()
            self.write()
            dist.barrier()
        self._time(calls)
        for kind, call in calls.items():
            self._profile(kind, call)
        self.write()
        dist.barrier()
        dist.destroy_process_group()

    def _prepare(self, kind: str) -> Callable[[Wan, str], Call]:
        if self.plan["step"] != FORWARD:
            return self._training
        return self._dense if kind == "dense" else self._salad

    def _warm_up(self, kind: str, call: Call) -> Call:
        """Compile, count pairs, compare the output with that of one process, and measure memory."""
        row = self.rows[kind]
        start = time.perf_counter()
        backends = set() if kind.endswith("in-turn") else {dist.get_backend()}  # read when the graph is written
        exchanging = mock.patch.object(attention, "OVERLAPPING_BACKENDS", backends)
        with measure_executions() as executions, exchanging:
            result = call()
        self.clock.synchronize()
        row["first_call_s"] = self.slowest(time.perf_counter() - start)
        if kind != "dense":
            computed, total = (sum(getattr(e, n) for e in executions) for n in ("computed_pairs", "total_pairs"))
            row["measured_sparsity"] = 1 - self.mean(computed) / max(self.mean(total), 1)
        if self.plan["step"] == FORWARD:
            row["error_to_one_gpu"] = self._compare(kind, result)
        del result
        start = time.perf_counter()
        result, working = self.clock.working_bytes(call)
        row["estimate_ms"] = self.slowest((time.perf_counter() - start) * 1e3)
        if working is not None:
            row["peak_bytes"] = self.slowest(row["parameter_bytes"] + working)
            row["working_bytes"] = self.slowest(working)
        if not all(bool(torch.isfinite(x).all()) for x in result):
            raise ArithmeticError("the result is not finite")
        return call

    def _compare(self, kind: str, outputs: Any) -> float | None:
        """Relative difference from what one process computed, which this one keeps if it is alone."""
        path = self.folder / "outputs" / f"{self.model.name}-{kind}.pt"
        output = outputs[0].float().cpu()
        if self.degree == 1:
            torch.save(output, path)
        if self.degree == 1 or not path.exists():
            return None
        wanted = torch.load(path)
        return float((output - wanted).norm() / wanted.norm())

    def _time(self, calls: dict[str, Call]) -> None:
        """All in turn, after the device was heated; a timing is that of the slowest process."""
        if self.device.type == "cuda":
            self.clock.heat(HEAT_S)
        rounds = self.plan["rounds"]
        times = {
            kind: max(FEWEST, min(rounds, int(self.plan["row_seconds"] * 1e3 / self.rows[kind]["estimate_ms"])))
            for kind in calls
        }
        measured: dict[str, list[float]] = {kind: [] for kind in calls}
        for number in range(max(times.values(), default=0)):
            for kind, call in calls.items():
                if number < times[kind]:
                    dist.barrier()
                    measured[kind].append(round(self.slowest(self.clock.milliseconds(call)), 4))
                    self.rows[kind] |= spread(measured[kind]) | {"timings_ms": measured[kind]}
            self.write()

    def _profile(self, kind: str, call: Call) -> None:
        """The share of a step that is exchange: of the process that waits least for the others, and of any."""
        from torch.profiler import ProfilerActivity, profile

        cuda = self.device.type == "cuda"
        dist.barrier()
        with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
            call()
            self.clock.synchronize()
        field = "self_device_time_total" if cuda else "cpu_time_total"
        own = [event for event in profiler.key_averages() if EXCHANGES[self.device.type] in event.key]
        spent = sum(getattr(event, field) for event in own) / 1e3
        row = self.rows[kind]
        row["exchange_ms"], row["exchange_waiting_ms"] = self.quickest(spent), self.slowest(spent)
        row["exchange_share"] = row["exchange_ms"] / row["median_ms"]
        row["exchanges"] = {event.key[:80]: event.count for event in own}

    # ------------------------------------------------------------ models

    def _time_dense(self) -> dict[str, float]:
        """Milliseconds of the dense kernels on what a process gets of attention: its part of the heads."""
        model = self.model
        shape = (1, model.tokens, max(1, model.heads // self.degree), model.head_dim)
        times = time_dense(shape, self.device, self.clock, training=False)
        return {name: round(self.slowest(ms), 4) for name, ms in times.items()}

    def _parts(self) -> dict[str, int]:
        """Of diffusers' dense attention: heads over as many processes as divide them, and a ring for the others."""
        ulysses = next(n for n in range(self.degree, 0, -1) if self.degree % n == 0 and self.model.heads % n == 0)
        return {"ulysses_degree": ulysses, "ring_degree": self.degree // ulysses}

    def _dense(self, base: Wan, kind: str) -> Call:
        dense, kernel = share(base), fastest(self.dense_times)
        if self.degree > 1:
            parts = self._parts()
            if parts["ring_degree"] > 1:  # a ring needs the softmax denominators, which only this one returns
                dense.set_attention_backend("_native_cudnn")
                kernel = "cuDNN"
            self.rows[kind] |= parts
            self._split(dense, **parts)
        compiler = self.plan["compiler"]
        dense.compile_repeated_blocks(**({} if compiler == "inductor" else {"backend": compiler}))
        self.rows[kind] |= {"dense_attention": kernel, "dense_attention_ms": self.dense_times}
        return self._step(dense, kind, kernel)

    def _salad(self, base: Wan, kind: str) -> Call:
        converted = self._converted(base, merge=True)
        if self.degree > 1:
            self._split(converted, ulysses_degree=self.degree)
            salad_compile.parallelise(converted)
        converted.compile_repeated_blocks(backend="salad", options={"lowering": self.plan["compiler"]})
        return self._step(converted, kind)

    def _converted(self, base: Wan, *, merge: bool) -> Wan:
        torch.manual_seed(2)  # the same random branches in all processes
        return convert(base, self.model, self.plan["sparsity"], self.inputs, merge=merge, settings={})

    def _split(self, model: Wan, **parts: int) -> None:
        from diffusers import ContextParallelConfig

        with self._an_accelerator():
            model.enable_parallelism(config=ContextParallelConfig(**parts))

    @contextlib.contextmanager
    def _an_accelerator(self) -> Iterator[None]:
        """diffusers 0.42.1 divides by the number of accelerators, and there are none here on a CPU."""
        if self.device.type == "cuda":
            yield
            return
        with mock.patch.object(torch.accelerator, "device_count", return_value=1):
            yield

    def _step(self, model: Wan, kind: str, kernel: str = "") -> Call:
        self.rows[kind]["parameter_bytes"] = sum(p.nbytes for p in model.parameters())
        one, shared = ("", kernel) if self.degree > 1 else (kernel, "")

        def run() -> tuple[Tensor, ...]:
            with torch.no_grad(), preferring(self.dense_times), self_attention_on(one), exchanged_on(shared):
                outputs: tuple[Tensor, ...] = model(**self.inputs)
            return outputs

        return run

    def _training(self, base: Wan, kind: str) -> Call:
        """Forward with gradient checkpointing, backward and AdamW: gates, projections and LoRA of a frozen base."""
        model = self._converted(base, merge=False)
        model.enable_gradient_checkpointing()
        model.train()
        row = self.rows[kind]
        trained = sum(p.numel() for branch in branches(model).values() for p in branch.parameters())
        row["trains"] = f"gate, projection and LoRA of every layer, {trained:,} parameters; AdamW"
        model.compile_repeated_blocks(backend="salad", options={"lowering": self.plan["compiler"]})
        wrapped = _shard(model) if kind == "fsdp2" else self._replicate(model)
        optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=LEARNING_RATE)
        row["parameter_bytes"] = sum((p.to_local() if kind == "fsdp2" else p).nbytes for p in wrapped.parameters())

        def run() -> tuple[Tensor, ...]:
            optimizer.zero_grad()
            loss = wrapped(**self.inputs)[0].float().square().mean()
            loss.backward()
            optimizer.step()
            return (loss.detach(),)

        return run

    def _replicate(self, model: Wan) -> Any:
        ids = [self.rank] if self.device.type == "cuda" else None
        return torch.nn.parallel.DistributedDataParallel(model, device_ids=ids)


@contextlib.contextmanager
def exchanged_on(kernel: str) -> Iterator[None]:
    """While active, dense attention that diffusers exchanges runs on one of `PACKAGES`; nothing changes for others."""
    if kernel not in PACKAGES:
        yield
        return
    from diffusers.models import attention_dispatch

    # private (diffusers 0.42.1): what its exchange calls for PyTorch's own attention
    with mock.patch.object(attention_dispatch, "_native_attention_forward_op", _forward_on(kernel)):
        yield


@functools.cache  # the same function every time: another one would have Dynamo compile again
def _forward_on(kernel: str) -> Callable[..., Tensor]:
    def forward(_: Any, query: Tensor, key: Tensor, value: Tensor, *options: Any, **named: Any) -> Tensor:
        return attend(query, key, value, kernel)

    return forward


def _shard(model: Wan) -> Any:
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


if __name__ == "__main__":
    Worker(json.loads(Path(sys.argv[1]).read_text())).run()
