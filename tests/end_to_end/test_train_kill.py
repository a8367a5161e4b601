"""`salad-compile train` on two processes, killed again and again: in the end nobody can tell."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from salad_compile.training import read_log
from tests.end_to_end.train_life import forkserver, live
from tests.salad_compile.training.tiny import SETTINGS, write_run

KILLS = 3  # `python -m tests.fuzz kills --only train` is for many
EVERY = 3  # steps between checkpoints
STEPS = 36  # of which a life takes at most 4, and what it does in the time of another two
SEED = int(os.environ.get("KILL_SEED", "0"))
RUN = dataclasses.replace(
    SETTINGS,
    steps=STEPS,
    batch=2,
    micro_batch=1,
    warmup_steps=10,
    sparsity_warmup=20,
    ema_decay=0.9,
    checkpoint_every=EVERY,
    keep_last=2,
    validation_every=20,
    validation_points=1,
)


class Watcher:
    """Looks at a run's directory again and again: what bears a final name must be whole."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.looks, self.faults = directory, 0, []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(0.005):
            for folder, folders, files in os.walk(self.directory):
                folders[:] = [name for name in folders if not name.startswith(".")]
                for name in [*folders, *files]:
                    if not name.startswith("."):
                        self._look(Path(folder) / name)

    def _look(self, path: Path) -> None:
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, "pt") as content:
                    for name in content.keys():  # noqa: SIM118 (safe_open is no dictionary)
                        content.get_tensor(name)
            elif path.suffix == ".json":
                json.loads(path.read_text())
            elif path.is_dir() and path.name.startswith("step-"):
                assert {"state.json", "salad.safetensors", "training.safetensors"} <= set(os.listdir(path))
            self.looks += 1
        except Exception as error:
            if path.exists():  # otherwise an old checkpoint was removed, whole
                self.faults.append(f"{path}: {error!r}")


def arguments(root: Path, output: Path) -> list[str]:
    given = {"model": "model", "latents": "latents", "validation": "held-out", "settings": "settings.json"}
    given |= {"conversion": "conversion.json"}
    options = [text for name, file in given.items() for text in (f"--{name}", str(root / file))]
    return ["train", *options, "--output", str(output), "--processes", "2"]


def begin(context: Any, root: Path, output: Path) -> Any:
    folder = root / f"{output.name}-said"
    folder.mkdir(exist_ok=True)
    process = context.Process(target=live, args=(arguments(root, output), str(folder)))
    process.start()
    return process


def last_step(output: Path) -> int:
    return max((line["step"] for line in read_log(output)), default=0)


def live_and_die(context: Any, root: Path, output: Path, chance: random.Random) -> str:
    """Kill the whole process group, some steps and a part of a step after the first logged step of this life."""
    steps, part = chance.randint(0, 3), chance.uniform(0, 2)
    before = last_step(output)
    process = begin(context, root, output)
    first = None
    while first is None or last_step(output) < first + steps:
        assert process.is_alive(), said(root, output)
        now = last_step(output)
        # a life that goes on from an earlier checkpoint cuts the log first
        if first is None and now != before:
            first = now
        time.sleep(0.002)
    time.sleep(part / read_log(output)[-1].get("steps_per_second", 20.0))
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL, "the run was finished before it was killed: it needs more steps"
    return f"from {before}, {steps} + {part:.2f} steps after step {first}, at {last_step(output)}"


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("given")
    write_run(root, RUN)
    return root


def said(root: Path, output: Path) -> str:
    return (root / f"{output.name}-said" / "said").read_text()[-3000:]


def test_kills_leave_no_trace(given: Path) -> None:
    context = forkserver()
    whole, killed = given / "whole", given / "killed"
    process = begin(context, given, whole)
    process.join()
    assert process.exitcode == 0, said(given, whole)

    chance = random.Random(SEED)
    with Watcher(killed) as watcher:
        for number in range(KILLS):
            print(f"seed {SEED}, kill {number + 1}: {live_and_die(context, given, killed, chance)}", flush=True)
        process = begin(context, given, killed)
        process.join()
    assert process.exitcode == 0, said(given, killed)
    assert not watcher.faults
    assert watcher.looks > 500
    assert_same_runs(killed, whole)


def assert_same_runs(run: Path, expected: Path) -> None:
    """Bitwise, but for how fast it went and what memory it took."""

    def curve(directory: Path) -> list[dict[str, Any]]:
        machine = ("steps_per_second", "peak_memory", "seconds", "result")
        return [{k: v for k, v in line.items() if k not in machine} for line in read_log(directory)]

    assert [line["step"] for line in curve(expected) if "loss" in line] == list(range(1, STEPS + 1))
    assert curve(run) == curve(expected)
    for name in ("salad.safetensors", "salad_ema.safetensors"):
        ours, theirs = load_file(run / name), load_file(expected / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000033", "step-00000036"]


@pytest.mark.parametrize(("number", "to_all"), [(signal.SIGTERM, False), (signal.SIGINT, True)])
def test_a_stopped_run_ends_with_a_checkpoint(given: Path, number: signal.Signals, to_all: bool) -> None:
    """As a scheduler stops the launcher, and as Ctrl-C does, which reaches every process and comes again from it."""
    output = given / f"stopped-{number.name}"
    process = begin(forkserver(), given, output)
    while last_step(output) < 4:
        assert process.is_alive(), said(given, output)
        time.sleep(0.01)
    (os.killpg if to_all else os.kill)(process.pid, number)
    process.join()
    assert process.exitcode == 128 + number, said(given, output)
    step = last_step(output)
    assert 4 <= step < STEPS
    assert (output / "checkpoints" / f"step-{step:08d}").is_dir(), said(given, output)
    assert "writes a checkpoint and ends" in said(given, output)


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.all_cases)])
def test_a_process_that_dies_ends_the_others(given: Path, rank: int) -> None:
    """As the kernel kills one for want of memory: within a minute, in a sentence, and the run goes on afterwards."""
    output, context = given / f"died-{rank}", forkserver()
    with Watcher(output) as watcher:
        process = begin(context, given, output)
        while last_step(output) < 4:
            assert process.is_alive(), said(given, output)
            time.sleep(0.01)
        ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(ranks[rank]), signal.SIGKILL)
        process.join(60)
        assert process.exitcode == 2, said(given, output)
        # or the other one, which has lost the connection, is seen first
        assert re.search(r"error: process \d terminated with (signal SIGKILL|exit code)", said(given, output))
        before = last_step(output)
        process = begin(context, given, output)
        while last_step(output) <= before:
            assert process.is_alive(), said(given, output)
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGTERM)
        process.join()
    assert process.exitcode == 128 + signal.SIGTERM, said(given, output)
    assert not watcher.faults
    assert not [name for name in os.listdir(output / "checkpoints") if name.startswith(".")]
