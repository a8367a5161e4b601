"""One denoising step and one training step of Wan2.1 over several GPUs, dense against SALAD.

    python benchmarks/scale.py                                      every degree that the machine has
    python benchmarks/scale.py --models 1.3B-480p --degrees 1 2 --budget-seconds 360
    python benchmarks/scale.py --tiny --device cpu --degrees 1 2    processes on CPUs: checks that it runs

Strong scaling: one denoising step whose tokens are split over the GPUs (context parallelism), dense by diffusers' own
exchange and SALAD by `salad_compile.parallelise`, timed in turn by the same processes. Weak scaling: one training step,
a video for each GPU, under DDP and FSDP2. Every case runs in processes of its own with a time limit
(scale_worker.py); rows are written as they come. benchmarks/README.md describes them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import BENCHMARKS, Budget, Facts, Results, default_output, describe
from transformer import FORWARD, MODELS, TRAINING, WEIGHTS, Model, fresh_caches

WORKER = BENCHMARKS / "scale_worker.py"
DEGREES = (1, 2, 4, 8)
GRACE_S = 20  # that the other processes get when one has failed
POLL_S = 0.5
STEP_KINDS, TRAINING_KINDS = ("salad", "dense"), ("ddp", "fsdp2")
IN_TURN = "salad-in-turn"
NAMES = {
    "dense": "dense, torch.compile",
    "salad": "SALAD, torch.compile",
    "ddp": "SALAD, DDP",
    "fsdp2": "SALAD, FSDP2",
    IN_TURN: "SALAD, exchange in turn",
}


def models() -> dict[str, Model]:
    """The sizes that can be chosen; "-4x" is a video of 321 frames instead of 81."""
    known = {model.name: model for model in MODELS if model.name != "1.3B-720p"}
    longer = [replace(m, name=f"{m.name}-4x", latent=(81, *m.latent[1:])) for m in known.values()]
    return known | {model.name: model for model in longer}


def tiny(model: Model) -> Model:
    """A size for tests: heads that four processes can share, and 256 tokens."""
    return replace(model.quick(), heads=4, layers=2, latent=(4, 16, 16))


@dataclass(frozen=True)
class Case:
    """What one group of processes times.

    Attributes:
        degree: GPUs. kinds: "salad", "salad-in-turn" and "dense" of a denoising step, "ddp" or "fsdp2" of a training
            step.
    """

    model: Model
    step: str
    degree: int
    kinds: tuple[str, ...]


def cases(chosen: list[Model], degrees: list[int], *, training: bool) -> Iterator[Case]:
    """In the order of importance: what exceeds the budget is left out."""
    usual, longer = [[m for m in chosen if m.name.endswith("-4x") is late] for late in (False, True)]
    for model in usual:
        for degree in degrees:
            # what it is worth to exchange while the linear branch is computed
            more = (IN_TURN,) if degree > 1 and model is usual[0] else ()
            yield Case(model, FORWARD, degree, (*STEP_KINDS, *more))
    if training:
        for kind in TRAINING_KINDS:
            for degree in degrees:
                yield Case((usual or longer)[0], TRAINING, degree, (kind,))
    for model in longer:
        for degree in reversed(degrees):  # the most GPUs first: on few it takes minutes
            yield Case(model, FORWARD, degree, STEP_KINDS)


# ---------------------------------------------------------------- processes


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return int(unused.getsockname()[1])


def start(case: Case, options: argparse.Namespace, folder: Path, seconds: float) -> list[subprocess.Popen[bytes]]:
    """The processes of a case, one for each GPU, each the leader of a process group of its own."""
    plan = {
        "model": vars(case.model) | {"latent": list(case.model.latent)},
        "kinds": case.kinds,
        "step": case.step,
        "folder": str(folder),
        "seconds": seconds,
        **{name: getattr(options, name) for name in ("device", "compiler", "sparsity", "rounds", "row_seconds")},
    }
    (folder / "plan.json").write_text(json.dumps(plan))
    shared = {"WORLD_SIZE": str(case.degree), "LOCAL_WORLD_SIZE": str(case.degree)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    if options.device == "cpu":
        shared |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    found = []
    for rank in range(case.degree):
        environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [sys.executable, str(WORKER), str(folder / "plan.json")]
        with (folder / f"said-{rank}").open("wb") as said:
            process = subprocess.Popen(
                command, env=environment, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
            )
        found.append(process)
    return found


def stop(processes: list[subprocess.Popen[bytes]]) -> None:
    """End the processes and what they started."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait(processes: list[subprocess.Popen[bytes]], seconds: float, written: Any) -> str:
    """Why not all processes ended well, or the empty string.

    Args:
        seconds: that they have. written: called from time to time, to keep the rows that they have written.
    """
    end = time.perf_counter() + seconds
    fault = ""
    while (codes := [process.poll() for process in processes]).count(None):
        bad = next((rank for rank, code in enumerate(codes) if code), None)
        if bad is not None and not fault:
            fault = f"process {bad} ended with {codes[bad]}"
            end = min(end, time.perf_counter() + GRACE_S)
        if time.perf_counter() > end:
            return fault or f"the time limit of {seconds:.0f} s was reached"
        written()
        time.sleep(POLL_S)
    return fault or next((f"process {rank} ended with {code}" for rank, code in enumerate(codes) if code), "")


# ---------------------------------------------------------------- rows


def facts_of(case: Case, kind: str, options: argparse.Namespace) -> Facts:
    """What is known of a row before it is measured."""
    model = case.model
    salad = kind != "dense"
    return {
        "row": NAMES[kind],
        "case": model.name,
        "kind": kind,
        "pass": case.step,
        "degree": case.degree,
        "sparsity": options.sparsity if salad else 0.0,
        "tokens": model.tokens,
        "latent": list(model.latent),
        "layers": model.layers,
        "heads": model.heads,
        "head_dim": model.head_dim,
        "compiled": f"each block, {options.compiler}",
        "weights": WEIGHTS,
        "timings_ms": [],
        "error": None,
    }


def read_rows(case: Case, options: argparse.Namespace, folder: Path, fault: str | None) -> list[Facts]:
    """The rows of a case as far as its first process has written them.

    Args:
        fault: why it will write no more, the empty string if it ended well; None while it runs.
    """
    path = folder / "rows.json"
    known: dict[str, Facts] = json.loads(path.read_text()) if path.exists() else {}
    rows = []
    for kind in case.kinds:
        row = facts_of(case, kind, options) | known.get(kind, {})
        if fault is not None and not row["timings_ms"] and not row["error"]:
            row["error"] = f"{fault or 'not timed'}: {last_words(folder)}"[:600]
        rows.append(row)
    return rows


def last_words(folder: Path) -> str:
    """The last line that a process of the case wrote, of the one whose output looks like an error if there is one."""
    lines = [said.read_text(errors="replace").strip().splitlines()[-1:] for said in sorted(folder.glob("said-*"))]
    words = [line[0] for line in lines if line]
    return next((line for line in words if "Error" in line), words[0] if words else "")


def compare(rows: list[Facts]) -> None:
    """Add to finished rows what follows from others.

    "efficiency" is time on one GPU / (GPUs x time) for a step that is shared, and time on one GPU / time for a training
    step, of which every GPU has its own; "speedup" is dense over SALAD at the same degree.
    """
    timed = {(r["case"], r["pass"], r["kind"], r["degree"]): r for r in rows if r.get("median_ms") and not r["error"]}
    for (case, step, kind, degree), row in timed.items():
        one = timed.get((case, step, kind, 1))
        if one is not None:
            work = degree if step == FORWARD else 1
            row["efficiency"] = one["median_ms"] / (work * row["median_ms"])
        dense = timed.get((case, step, "dense", degree))
        if dense is not None:
            row["speedup"] = dense["median_ms"] / row["median_ms"]


def print_row(row: Facts) -> None:
    """One line."""
    name = f"  {row['row']} on {row['degree']}"
    if row["error"] or not row.get("median_ms"):
        print(f"{name:32}{row['error'] or 'not timed'}", flush=True)
        return
    parts = [f"{row['median_ms']:.1f} ms ({row['p10_ms']:.1f} to {row['p90_ms']:.1f})"]
    if row.get("efficiency"):
        parts.append(f"efficiency {row['efficiency']:.1%}")
    if row.get("exchange_share") is not None:
        parts.append(f"exchange {row['exchange_share']:.1%}")
    if row.get("speedup") and row["kind"] == "salad":
        parts.append(f"{row['speedup']:.2f}x dense")
    if row.get("peak_bytes"):
        parts.append(f"peak {row['peak_bytes'] / 2**30:.1f} GiB")
    if row.get("error_to_one_gpu") is not None:
        parts.append(f"differs from one GPU by {row['error_to_one_gpu']:.1e}")
    print(f"{name:32}{', '.join(parts)}", flush=True)


# ---------------------------------------------------------------- the run


def run_case(case: Case, options: argparse.Namespace, budget: Budget, results: Results, outputs: Path) -> None:
    """Start the processes of a case, wait for them, and keep the rows; once more for SALAD if dense failed it."""
    print(f"\n{case.model.name}, {case.step}, {case.model.tokens:,} tokens, {case.degree} processes", flush=True)
    if budget.spent():
        results.add([facts_of(case, kind, options) | {"error": budget.excuse()} for kind in case.kinds])
        print(f"  {budget.excuse()}", flush=True)
        return
    left = budget.seconds - budget.elapsed() if budget.seconds is not None else options.case_seconds
    seconds = min(options.case_seconds, left)
    with tempfile.TemporaryDirectory(prefix="salad_scale_", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / "outputs").symlink_to(outputs)
        processes = start(case, options, folder, seconds)
        try:
            running = lambda: results.write_sometimes(lambda: read_rows(case, options, folder, None))  # noqa: E731
            fault = wait(processes, seconds, running)
        finally:
            stop(processes)
        rows = read_rows(case, options, folder, fault)
        if fault and options.verbose:
            print(*(said.read_text(errors="replace")[-3000:] for said in sorted(folder.glob("said-*"))), sep="\n---\n")
    again = [row["kind"] for row in rows if row["error"] and row["kind"] == "salad" and len(rows) > 1]
    rows = [row for row in rows if row["kind"] not in again or budget.spent()]
    compare([*results.rows(), *rows])
    results.add(rows)
    for row in rows:
        print_row(row)
    if again and not budget.spent():
        run_case(replace(case, kinds=("salad",)), options, budget, results, outputs)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(models())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--models", nargs="+", default=names, choices=names)
    parser.add_argument("--degrees", nargs="+", type=int, help="GPUs (default: 1, 2, 4, 8, as many as there are)")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--rounds", type=int, default=10, help="timings of a row (default: %(default)s)")
    parser.add_argument("--row-seconds", type=float, default=8, help="a slow row takes no longer, but for two timings")
    parser.add_argument("--no-training", dest="training", action="store_false", help="denoising steps only")
    parser.add_argument("--training-only", action="store_true", help="training steps only")
    parser.add_argument("--compiler", default="inductor", choices=("inductor", "aot_eager", "eager"))
    parser.add_argument("--budget-seconds", type=float, default=540, help="then no new case starts")
    parser.add_argument("--case-seconds", type=float, default=180, help="a case that takes longer is ended")
    parser.add_argument("--output", type=Path, help="where the JSON goes (default: benchmarks/results/ on a GPU)")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, two rounds")
    parser.add_argument("--verbose", action="store_true", help="print what the processes of a failed case said")
    options = parser.parse_args(arguments)
    if options.tiny:
        options.rounds = 2
    if not options.degrees:
        there = torch.cuda.device_count() if options.device == "cuda" else 2
        options.degrees = [degree for degree in DEGREES if degree <= there]
    return options


def main(arguments: list[str] | None = None) -> None:
    """Run the cases and keep their rows."""
    options = parse(arguments)
    device, budget = torch.device(options.device), Budget(options.budget_seconds)
    known = models()
    chosen = [tiny(known[name]) if options.tiny else known[name] for name in options.models]
    common = describe(device) | {"tiny": options.tiny}
    results = Results(options.output or default_output("scale", device), common)
    print(f"{common['device']}, torch {common['torch']}, degrees {options.degrees}; rows in {results.path}", flush=True)
    with fresh_caches(), tempfile.TemporaryDirectory(prefix="salad_outputs_", ignore_cleanup_errors=True) as outputs:
        for case in cases(chosen, options.degrees, training=options.training):
            if options.training_only and case.step != TRAINING:
                continue
            run_case(case, options, budget, results, Path(outputs))
    print(f"\ndone after {budget.elapsed():.0f} s", flush=True)


if __name__ == "__main__":
    main()
