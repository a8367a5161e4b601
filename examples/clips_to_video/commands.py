"""`salad-compile` as a user runs it, each command a process of its own, which may be killed half way.

The processes are forked from one that has torch, diffusers and salad_compile imported: importing takes longest here.
"""

from __future__ import annotations

import multiprocessing
import os
import shlex
import signal
import time
from collections.abc import Callable

PRELOAD = ("diffusers", "transformers", "salad_compile.command_line.train", "salad_compile.training.loop")


class Commands:
    """Runs them one after the other, and shows each before it runs."""

    def __init__(self) -> None:
        # a killed process leaves semaphores behind, and Python says so at its end
        os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning:multiprocessing.resource_tracker")
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(PRELOAD))

    def run(self, *words: object) -> None:
        """Raises SystemExit: the command failed."""
        code = self._start(words).wait()
        if code:
            raise SystemExit(f"salad-compile {words[0]} ended with {code}")

    def kill(self, *words: object, when: Callable[[], bool]) -> None:
        """Start a command, and send it SIGKILL as soon as something is so.

        Raises:
            SystemExit: the command ended before.
        """
        process = self._start(words)
        while not when():
            if process.ended:
                raise SystemExit(f"salad-compile {words[0]} ended before it was killed")
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        if process.wait() != -signal.SIGKILL:
            raise SystemExit(f"salad-compile {words[0]} ended before it was killed")

    def _start(self, words: tuple[object, ...]) -> _Process:
        given = [str(word) for word in words]
        print(f"$ salad-compile {shlex.join(given)}", flush=True)
        return _Process(self._context, given)


class _Process:
    def __init__(self, context: multiprocessing.context.ForkServerContext, words: list[str]) -> None:
        self._process = context.Process(target=_main, args=(words,))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def ended(self) -> bool:
        return self._process.exitcode is not None

    def wait(self) -> int:
        self._process.join()
        assert self._process.exitcode is not None
        return self._process.exitcode


def _main(words: list[str]) -> None:
    from salad_compile.command_line import main

    os._exit(main(words))
