"""Choosing launch settings: defaults, winners, the file they are kept in. Nothing here needs a GPU."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from salad_compile.kernels import tuning
from salad_compile.kernels.launch import launch, record_launches
from salad_compile.kernels.tuning import cache_file, choose, forget

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@dataclass(frozen=True)
class Settings:
    tile: int
    warps: int = 4
    pipelined: bool = True
    maxnreg: int | None = None


DEFAULT, SLOW, FAST, BROKEN = CANDIDATES = [Settings(64), Settings(32), Settings(128, 8), Settings(256, maxnreg=128)]
KEY = (torch.bfloat16, 128, 32768)
MILLISECONDS = {DEFAULT: 2.0, SLOW: 3.0, FAST: 1.0}


class Runs:
    """Stands in for a kernel: notes the candidates that it is launched with."""

    def __init__(self) -> None:
        self.seen: list[Settings] = []

    def __call__(self, settings: Settings) -> Settings:
        self.seen.append(settings)
        if settings == BROKEN:
            raise RuntimeError("out of resource: shared memory")
        return settings


@pytest.fixture
def runs() -> Runs:
    return Runs()


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("SALAD_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(tuning, "_wanted", False)
    forget()
    yield
    forget()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pretended GPU on which every candidate takes the time that is written above."""

    def do_bench(run: Callable[[], Settings], return_mode: str) -> float:
        assert return_mode == "median"
        return MILLISECONDS[run()]

    monkeypatch.setattr("triton.testing.do_bench", do_bench)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Pretended GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


def pick(run: Callable[[Settings], object], device: torch.device = CUDA, **changes: Any) -> Settings:
    """One call of `choose`."""
    arguments = {"operator": "toy", "key": KEY, "candidates": CANDIDATES, "run": run, "device": device} | changes
    return choose(**arguments)


@contextlib.contextmanager
def autotune() -> Iterator[None]:
    """As in a process with SALAD_AUTOTUNE=1."""
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(tuning, "_wanted", True)
        yield


def tuned(run: Callable[[Settings], object], **changes: Any) -> Settings:
    """One call of `choose` that may measure."""
    with autotune():
        return pick(run, **changes)


@pytest.mark.usefixtures("gpu")
def test_without_tuning_the_default_is_taken_and_nothing_runs(runs: Runs) -> None:
    assert [pick(runs), pick(runs)] == [DEFAULT, DEFAULT]
    assert runs.seen == []
    assert not cache_file().exists()


@pytest.mark.usefixtures("gpu")
def test_tuning_takes_the_fastest_and_leaves_out_what_fails(runs: Runs, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "salad_compile"):
        assert tuned(runs) == FAST
    assert runs.seen == CANDIDATES
    assert any("left out: RuntimeError: out of resource" in message for message in caplog.messages)


@pytest.mark.usefixtures("gpu")
def test_a_winner_is_measured_once_and_used_after_the_context(runs: Runs) -> None:
    assert pick(runs) == DEFAULT
    assert [tuned(runs), tuned(runs), pick(runs)] == [FAST] * 3
    assert len(runs.seen) == len(CANDIDATES)
    assert pick(runs, key=(torch.float16,)) == pick(runs, operator="other") == DEFAULT


@pytest.mark.usefixtures("gpu")
def test_a_hit_is_one_look_into_memory(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned(runs)
    pick(runs, key=())
    for name in ("_stored", "_measure"):
        monkeypatch.setattr(tuning, name, None)
    assert (pick(runs), pick(runs, key=())) == (FAST, DEFAULT)


@pytest.mark.usefixtures("gpu")
def test_where_nothing_runs_the_default_is_kept_in_memory_only(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(settings: Settings) -> None:
        raise RuntimeError("no device memory")

    assert tuned(fails) == DEFAULT
    assert "no launch settings could be timed" in caplog.text
    assert not cache_file().exists()


def test_the_environment_variable_tunes_a_whole_process(tmp_path: Path) -> None:
    code = "from salad_compile.kernels import tuning; print(tuning._wanted)"
    for value, wanted in (("1", "True"), ("0", "False")):
        environment = os.environ | {"SALAD_AUTOTUNE": value}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == wanted


# --- where nothing is measured ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("gpu")
def test_cpu_and_interpreter_never_tune(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tuned(runs, device=CPU) == DEFAULT
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert tuned(runs) == DEFAULT
    assert runs.seen == []


@pytest.mark.usefixtures("gpu")
def test_a_captured_graph_takes_what_is_known_and_measures_later(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tuned(runs) == DEFAULT
    assert runs.seen == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert tuned(runs) == FAST
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tuned(runs) == FAST


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("device", [CPU, CUDA, torch.device("meta")])
def test_while_recording_every_candidate_is_launched(device: torch.device) -> None:
    def run(settings: Settings) -> None:
        launch(None, (1,), device, num_warps=settings.warps, TILE=settings.tile)

    with record_launches() as launches, autotune():
        assert pick(run, device) == DEFAULT
    assert [recorded.constants["TILE"] for recorded in launches] == [settings.tile for settings in CANDIDATES]
    assert not cache_file().exists()


# --- the file ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("gpu")
def test_winners_reach_other_processes_through_the_file(runs: Runs) -> None:
    tuned(runs)
    forget()  # as a new process would begin
    assert pick(runs) == FAST
    assert len(runs.seen) == len(CANDIDATES)
    (entry,) = json.loads(cache_file().read_text())["entries"].items()
    assert entry[1] == asdict(FAST)
    for part in ("toy", "torch.bfloat16", "32768", "Pretended GPU", "Triton 3."):
        assert part in entry[0]


@pytest.mark.usefixtures("gpu")
def test_a_winner_of_another_gpu_or_triton_is_not_used(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned(runs)
    for owner, name, value in ((torch.cuda, "get_device_name", lambda device: "Other"), ("triton", "__version__", "9")):
        with monkeypatch.context() as changed:
            if isinstance(owner, str):
                changed.setattr(f"{owner}.{name}", value)
            else:
                changed.setattr(owner, name, value)
            forget()
            assert pick(runs) == DEFAULT
    forget()
    assert pick(runs) == FAST


@pytest.mark.usefixtures("gpu")
def test_a_winner_that_ships_no_longer_is_not_used(runs: Runs) -> None:
    tuned(runs)
    forget()
    assert pick(runs, candidates=[DEFAULT, SLOW]) == DEFAULT


@pytest.mark.usefixtures("gpu")
def test_the_file_is_read_once(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Path] = []
    monkeypatch.setattr(tuning, "_read", lambda path: reads.append(path) or {})
    for length in range(5):
        pick(runs, key=(length,))
    assert reads == [cache_file()]


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '"text"',
        '{"format": 2, "entries": {}}',
        '{"format": 1, "entries": [1]}',
        '{"format": 1, "entries": {"a": 1}}',
    ],
)
def test_a_file_that_makes_no_sense_is_ignored_and_replaced(runs: Runs, content: str) -> None:
    cache_file().write_text(content)
    with pytest.warns(UserWarning, match=r"ignoring .*tuning\.json"):
        assert pick(runs) == DEFAULT
    with pytest.warns(UserWarning, match="ignoring"):
        assert tuned(runs) == FAST
    forget()
    assert pick(runs) == FAST


@pytest.mark.usefixtures("gpu")
def test_bytes_that_are_no_text_are_ignored(runs: Runs) -> None:
    cache_file().write_bytes(b"\xff\xfe\x00\x80")
    with pytest.warns(UserWarning, match="ignoring"):
        assert pick(runs) == DEFAULT


@pytest.mark.usefixtures("gpu")
def test_writing_keeps_what_another_process_wrote_meanwhile(runs: Runs) -> None:
    assert pick(runs) == DEFAULT  # this process has read the file, which was not there
    other = {"other kernel": {"tile": 16}}
    cache_file().write_text(json.dumps({"format": 1, "entries": other}))
    tuned(runs)
    tuned(runs, key=(torch.float16,))
    entries = json.loads(cache_file().read_text())["entries"]
    assert len(entries) == 3
    assert entries["other kernel"] == other["other kernel"]


@pytest.mark.usefixtures("gpu")
def test_a_write_brings_back_what_was_lost_in_a_race(runs: Runs) -> None:
    tuned(runs)
    cache_file().unlink()
    tuned(runs, key=(torch.float16,))
    assert len(json.loads(cache_file().read_text())["entries"]) == 2


@pytest.mark.usefixtures("gpu")
def test_a_reader_never_sees_half_a_file(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned(runs)
    before = cache_file().read_bytes()

    def interrupted(source: object, target: object) -> None:
        assert json.loads(Path(str(source)).read_text())["entries"]  # complete before it takes the place of the old one
        assert cache_file().read_bytes() == before
        raise OSError("power failure")

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.warns(UserWarning, match="not kept: power failure"):
        assert tuned(runs, key=(torch.float16,)) == FAST
    assert cache_file().read_bytes() == before


@pytest.mark.usefixtures("gpu")
def test_a_folder_that_cannot_be_written_is_no_error(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SALAD_CACHE_DIR", str(tmp_path / "file" / "folder"))
    with pytest.warns(UserWarning, match="not kept"):
        assert tuned(runs) == FAST
    assert pick(runs) == FAST


def test_where_the_file_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_file() == tmp_path / "tuning.json"
    monkeypatch.delenv("SALAD_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_file() == Path("/somewhere/salad_compile/tuning.json")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_file() == Path("/home/someone/.cache/salad_compile/tuning.json")
