"""Run a script of the repository as a user does, in a process that need not import everything first."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import torch
import torch.multiprocessing as mp

from tests.end_to_end.train_life import forkserver


def run_script(script: Path, *arguments: str, said: Path) -> str:
    """What the script prints, which also goes into the file `said`; an exit code other than 0 is an error."""
    forkserver()
    try:
        mp.start_processes(_run, args=(str(script), arguments, str(said)), nprocs=1, start_method="forkserver")
    except Exception as error:
        error.add_note(said.read_text()[-3000:] if said.is_file() else "it said nothing")
        raise
    return said.read_text()


def _run(rank: int, script: str, arguments: tuple[str, ...], said: str) -> None:
    output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(output, stream.fileno())
    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(script).parent))
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
