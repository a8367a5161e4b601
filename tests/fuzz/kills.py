"""`python -m tests.fuzz kills --n 30`: SIGKILL at random moments of save, export, latents convert and train.

Afterwards what has a final name is whole, the same command succeeds, and nothing of the dead process is left. With
`--same-pid` every process is number 1 of a namespace of its own, as in containers. Processes are forks of this one, so
that each need not import everything.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import random
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

import salad_compile
from salad_compile import command_line
from salad_compile.latents import convert_latents, open_latents, write_latents
from salad_compile.salad_files.runs import complete_checkpoints
from salad_compile.salad_files.salad_file import open_file
from tests.fuzz.subjects import RUN
from tests.models.zoo import CASES
from tests.salad_compile.latents.data import make_items
from tests.salad_compile.training.tiny import write_run
from tests.support import converted

MOMENTS = {"save": 0.3, "export": 0.8, "latents": 0.5, "train": 1.5}  # seconds, about what each takes
ACTIONS = tuple(MOMENTS)
CLONE_NEWPID = 0x20000000


def act(action: str, root: Path) -> int:
    """What is killed."""
    if action == "latents":
        convert_latents(root / "source", root / "latents", progress=False)
    elif action == "train":
        given = ("model", "latents", "settings", "conversion")
        files = ("model", "latents", "settings.json", "conversion.json")
        words = [w for n, f in zip(given, files, strict=True) for w in (f"--{n}", str(root / "given" / f))]
        return command_line.main(["train", *words, "--output", str(root / "train"), "-q"])
    else:
        model = converted(CASES["Wan"])
        for _ in range(10):
            if action == "save":
                salad_compile.save(model, root / "save" / "salad.safetensors")
            else:
                salad_compile.export(model, root / "export" / "out", ("salad", "merged"))
    return 0


def look(action: str, root: Path) -> None:
    """Raises where a final name has something half written."""
    folder = root / action
    if action == "train":
        complete_checkpoints(folder)
        if (folder / "training.json").exists():
            json.loads((folder / "training.json").read_text())
    for file in folder.rglob("*.safetensors"):
        if not any(part.startswith(".") for part in file.relative_to(folder).parts):
            load_file(file)
    for file in [*folder.glob("salad.safetensors"), *folder.glob("out/salad.safetensors")]:
        with open_file(file):
            pass
    if (folder / "items.jsonl").exists():
        assert len(open_latents(folder)) == ITEMS


ITEMS = 200


def leftovers(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob(".*")]


def prepare(root: Path) -> None:
    """What the commands are given."""
    torch.set_num_threads(1)
    converted(CASES["Wan"])  # probed once
    write_latents(make_items(ITEMS), root / "source")
    (root / "given").mkdir()
    write_run(root / "given", RUN.with_changes({"steps": 60, "checkpoint_every": 1, "keep_last": 2}))
    for action in ACTIONS:
        (root / action).mkdir()


def start(action: str, root: Path, same_pid: bool) -> int:
    """The number of a process, leader of its group, that does it and exits with 0 or 1."""
    process = os.fork()
    if process:
        return process
    os.setsid()
    os.dup2(os.open(root / "said", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    if same_pid:
        if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWPID) != 0:
            os._exit(os.EX_NOPERM)
        inner = os.fork()
        if inner:
            os._exit(os.waitstatus_to_exitcode(os.waitpid(inner, 0)[1]) != 0)
        assert os.getpid() == 1
    try:
        os._exit(act(action, root))
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def ended(process: int) -> int | None:
    """Its exit code, or None while it runs."""
    number, status = os.waitpid(process, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if number else None


def run(number: int, seed: int, actions: list[str], same_pid: bool, tell: Callable[[str], None] = print) -> list[str]:
    """`number` kills of each action; what went wrong."""
    faults: list[str] = []
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        prepare(root)
        for action in actions:
            if action == "latents":
                (root / action).rmdir()
            chance, kills = random.Random(f"{seed}/{action}"), 0
            for _ in range(4 * number):
                if kills == number:
                    break
                before = newest(root / action)
                process = start(action, root, same_pid)
                code = None
                while code is None and newest(root / action) == before:
                    time.sleep(0.002)  # until it has begun to write
                    code = ended(process)
                time.sleep(chance.uniform(0, MOMENTS[action]))
                code = ended(process) if code is None else code
                if code is None:
                    os.killpg(process, signal.SIGKILL)
                    os.waitpid(process, 0)
                    kills += 1
                elif action in ("latents", "train"):  # it was quicker: begin anew, for a finished one has nothing to do
                    shutil.rmtree(root / action, ignore_errors=True)
                try:
                    look(action, root)
                except Exception as error:
                    faults.append(f"{action}, kill {kills}: {type(error).__name__}: {error}")
            if os.waitpid(start(action, root, same_pid), 0)[1] != 0:
                faults.append(f"{action}: the next run failed: {(root / 'said').read_text()[-500:]}")
            look(action, root)
            faults += [f"{action}: left {name}" for name in leftovers(root / action)]
            tell(f"{action}: {kills} killed of {number}")
    return faults


def newest(folder: Path) -> float:
    """When something in it was last written."""
    if not folder.exists():
        return 0.0
    times = [0.0]
    for place, folders, files in os.walk(folder):  # passes over what goes meanwhile
        for name in (".", *folders, *files):
            with contextlib.suppress(FileNotFoundError):
                times.append((Path(place) / name).stat().st_mtime)
    return max(times)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--n", type=int, default=30, help="kills of each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=ACTIONS, default=list(ACTIONS))
    parser.add_argument("--same-pid", action="store_true", help="every process is number 1 of its namespace")


def main(arguments: argparse.Namespace) -> int:
    faults = run(arguments.n, arguments.seed, arguments.only, arguments.same_pid)
    print(f"{len(faults)} faults", *faults, sep="\n")
    return int(bool(faults))
