"""Processes for the tests, forked from one that has everything imported: importing takes longest."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
from pathlib import Path

import accelerate  # noqa: F401
import diffusers.models.transformers.transformer_wan  # noqa: F401
import torch
import torch._dynamo
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.launcher.api

import salad_compile.salad_files.salad_file
import salad_compile.training.loop  # noqa: F401
import tests.models.zoo
import tests.support  # noqa: F401
from salad_compile.command_line import main, train


def forkserver() -> multiprocessing.context.ForkServerContext:
    """Where the processes of a test come from; all tests of a pytest process share the one server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def begin_session() -> None:
    """Be the first process of a session, as under a terminal, whose hangup counts: nohup hands on that none does."""
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def live(arguments: list[str], folder: str) -> None:
    """Run the command in a process group of its own; what it and its processes say goes into `folder`/said."""
    begin_session()
    said = os.open(Path(folder) / "said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, sys.stdout.fileno())
    os.dup2(said, sys.stderr.fileno())
    tempfile.tempdir = folder  # what torch's process starter leaves behind when it is killed
    torch.set_num_threads(1)
    train.START_METHOD = "fork"  # the processes of this run need not import everything again
    os._exit(main(arguments))
