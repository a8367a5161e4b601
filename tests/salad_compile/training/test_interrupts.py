"""Which signals are remembered, and which do what they always do."""

from __future__ import annotations

import os
import pty
import signal
import threading
import time
from pathlib import Path

import pytest

from salad_compile.training import interrupts
from salad_compile.training.interrupts import SIGNALS, StopRequest
from tests.end_to_end.train_life import begin_session, forkserver


@pytest.mark.parametrize("number", SIGNALS)
def test_twice_at_once_is_one_request(number: signal.Signals) -> None:
    found = signal.signal(number, signal.SIG_DFL)  # nohup and jobs in the background ignore some
    try:
        with StopRequest() as stop:
            assert not stop.asked
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
            assert stop.number == number
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, found)


def test_a_hangup_that_nohup_ignores_is_none() -> None:
    found = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.asked
    finally:
        signal.signal(signal.SIGHUP, found)


def work_until_asked(terminal: str, file: str) -> None:
    """Say something in a terminal, as the first process of its session, and go on saying it when that is gone."""
    begin_session()
    descriptor = os.open(terminal, os.O_RDWR)  # the terminal of this session now
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    with StopRequest() as stop:
        os.write(1, b"ready")
        while not stop.asked:
            time.sleep(0.01)
        os.write(2, b"a checkpoint")
        os.write(1, b"a result")
    Path(file).write_text(str(stop.number))


def test_a_terminal_that_is_closed_does_not_end_what_is_done(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    process = forkserver().Process(target=work_until_asked, args=(os.ttyname(theirs), str(tmp_path / "done")))
    process.start()
    assert os.read(ours, 5) == b"ready"
    os.close(theirs)
    os.close(ours)
    process.join(60)
    process.kill()
    assert (tmp_path / "done").read_text() == str(int(signal.SIGHUP))


def test_a_later_signal_interrupts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "SAME_REQUEST_SECONDS", -1.0)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGINT)
            assert stop.asked
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread_nothing_is_changed() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def enter() -> None:
        with StopRequest():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [before]
