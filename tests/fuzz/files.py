"""`python -m tests.fuzz files --n 2000`: damaged files give what the undamaged ones do, or an error of ours.

Each case runs in a fork: it may take two seconds and 300 MB, must run no command, and must leave the model as it was.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch

from salad_compile.errors import SaladError
from tests.fuzz.mutations import mutate
from tests.fuzz.subjects import FILES, SUBJECTS, Subject, copy_of

SECONDS, BYTES = 2.0, 300 * 2**20  # of the processor's time, so that a busy machine is no fault
PATIENCE = 20.0
COMMANDS = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pty.spawn")


def attempt(subject: Subject, folder: Path) -> str:
    """`original:DIGEST`, `own:CLASS`, or a fault, in a process of its own."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(reading)
        os.write(writing, _outcome(subject, folder).encode()[:4000])
        os._exit(0)
    os.close(writing)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(process, signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode()
    _, status, used = os.wait4(process, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    took = used.ru_utime + used.ru_stime
    if not said:
        return f"FAULT: ended with status {status} after {took:.1f} s"
    return said if took <= SECONDS else f"FAULT: took {took:.1f} s ({said})"


def _outcome(subject: Subject, folder: Path) -> str:
    sys.addaudithook(_refuse)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # warnings
    with open("/proc/self/statm") as statm:
        size = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + BYTES, size + BYTES))
    try:
        return f"original:{subject.read(folder)}"
    except (SaladError, FileNotFoundError) as error:
        return f"own:{type(error).__name__}"
    except BaseException as error:
        return f"FAULT: {type(error).__name__}: {error}"


def _refuse(event: str, arguments: object) -> None:
    if event in COMMANDS:
        raise AssertionError(f"a command ran: {event} {arguments}")


def run(number: int, seed: int, names: list[str]) -> list[str]:
    """The faults among `number` cases."""
    torch.set_num_threads(1)
    faults: list[str] = []
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        expected = {}
        for name in names:
            original = root / name / "original"
            original.parent.mkdir()
            SUBJECTS[name].write(original)
            expected[name] = attempt(SUBJECTS[name], copy_of(original, root / name / "copy"))
            if not expected[name].startswith("original:"):
                return [f"{name}, undamaged: {expected[name]}"]
        for case in range(number):
            name = names[case % len(names)]
            chance = random.Random(f"{seed}/{case}")
            folder = copy_of(root / name / "original", root / name / "copy")
            files = sorted(file for file in folder.rglob(FILES.get(name, "*")) if file.is_file())
            said = mutate(chance.choice(files), chance)
            outcome = attempt(SUBJECTS[name], folder)
            if outcome.startswith("original:") and outcome != expected[name] and SUBJECTS[name].strict:
                outcome = "FAULT: another result, silently"
            counts[f"{name}: {outcome.partition(':')[0]}"] += 1
            if outcome.startswith("FAULT"):
                faults.append(f"seed {seed}, case {case}, {name}, {said}: {outcome}")
                print(faults[-1], flush=True)
    print(", ".join(f"{what} {count}" for what, count in sorted(counts.items())))
    return faults


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--n", type=int, default=2000, help="cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))


def main(arguments: argparse.Namespace) -> int:
    faults = run(arguments.n, arguments.seed, arguments.only)
    print(f"{arguments.n} cases, {len(faults)} faults")
    return int(bool(faults))
