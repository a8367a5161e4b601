"""The record of compiled kernels: what changes a fingerprint, and what the gate compiles beside it."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from salad_compile.kernels import compiled, inspect
from salad_compile.kernels.aot import Specialised, specialise
from salad_compile.kernels.compiled import Record, compiler, fingerprint
from salad_compile.kernels.engines import Call, GateCall
from salad_compile.kernels.engines.torch import TorchEngine
from salad_compile.kernels.errors import KernelRecordError
from salad_compile.kernels.launch import Launch, interpreting, launch

pytestmark = pytest.mark.skipif(interpreting(), reason="nothing can be compiled in a process that interprets")

META = torch.device("meta")
MODULE = """
import dataclasses
import triton
import triton.language as tl

FACTOR: tl.constexpr = tl.constexpr(2)

@dataclasses.dataclass(frozen=True)
class Settings:
    size: int

    @property
    def width(self) -> int:
        return self.size * 2

@triton.jit
def inner(x):
    return x * FACTOR

@triton.jit
def outer(x, SETTINGS: tl.constexpr):
    tl.store(x + tl.arange(0, SETTINGS.width), inner(1.0))
"""
CHANGES = {
    "the kernel": ("inner(1.0)", "inner(3.0)"),
    "what it calls": ("x * FACTOR", "x + FACTOR"),
    "a constant of its module": ("constexpr(2)", "constexpr(4)"),
    "a property of its settings": ("self.size * 2", "self.size * 4"),
}


@triton.jit
def copy_kernel(x, out, TILE: tl.constexpr):
    tl.store(out + tl.arange(0, TILE), tl.load(x + tl.arange(0, TILE)).to(out.dtype.element_ty))


def copy(tile: int = 64, dtype: torch.dtype = torch.bfloat16, arch: int = 90, warps: int = 4) -> Specialised:
    x = torch.empty(64, dtype=dtype, device=META)
    return specialise(Launch(copy_kernel, (x, x), {"TILE": tile}, {"num_warps": warps, "num_stages": 1}), arch)


def written(folder: Path, text: str, name: str) -> Specialised:
    """The kernel `outer` of a module of this text."""
    path = folder / f"{name}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location("written_kernels", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["written_kernels"] = module  # where `inspect` looks for the source of a class
    spec.loader.exec_module(module)
    x = torch.empty(64, device=META)
    launch = Launch(module.outer, (x,), {"SETTINGS": module.Settings(8)}, {"num_warps": 4, "num_stages": 1})
    return specialise(launch, 90)


def test_every_argument_counts() -> None:
    sources = [copy(), copy(tile=32), copy(dtype=torch.float32), copy(arch=80), copy(warps=8)]
    assert len({fingerprint(source) for source in sources}) == len(sources)
    assert fingerprint(copy()) == fingerprint(copy())


@pytest.mark.parametrize("change", CHANGES)
def test_code_that_a_kernel_follows_from_counts(change: str, tmp_path: Path) -> None:
    before = fingerprint(written(tmp_path, MODULE, "before"))
    assert fingerprint(written(tmp_path, MODULE, "again")) == before
    text = MODULE.replace(*CHANGES[change])
    assert text != MODULE
    assert fingerprint(written(tmp_path, text, "after")) != before


def test_the_judges_are_a_part_of_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    before = compiler(90)
    assert triton.__version__ in before
    assert compiler(80) != before
    monkeypatch.setattr(compiled, "sass", compiled.aot)  # as if the rules were others
    compiler.cache_clear()
    assert compiler(90) != before
    monkeypatch.undo()
    compiler.cache_clear()
    assert compiler(90) == before


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    Record({90: compiler(90)}, {fingerprint(copy()): "copy"}).write(path)
    record = Record.read(path)
    assert record.has(copy())
    assert not record.has(copy(tile=32))
    assert not record.has(copy(arch=80))
    assert not Record({90: "another"}, record.kernels).has(copy())


def break_json(path: Path) -> None:
    path.write_text("{")


def of_another_format(path: Path) -> None:
    path.write_text(json.dumps({"format": 99, "compilers": {}, "kernels": {}}))


def a_list(path: Path) -> None:
    path.write_text("[]")


@pytest.mark.parametrize("damage", [Path.unlink, break_json, of_another_format, a_list])
def test_what_is_no_record_is_an_error(
    damage: Callable[[Path], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "record.json"
    Record({}, {}).write(path)
    damage(path)
    with pytest.raises(KernelRecordError, match="`make gate` writes one"):
        Record.read(path)
    assert inspect.main(["--compiled", str(path)]) == 2
    assert "is no record of compiled kernels" in capsys.readouterr().err


class Copies(TorchEngine):
    """Launches `copy_kernel` with these sizes."""

    name = "copies"
    tiles = (16, 32)

    def gate_calls(self, arch: int) -> tuple[GateCall, ...]:
        call = Call("linear_state", META, torch.bfloat16)
        return tuple(GateCall(call, f"tile{tile}", (tile,)) for tile in self.tiles)

    def run(self, call: Call, *arguments: Any) -> None:
        x = torch.empty(64, dtype=torch.bfloat16, device=META)
        launch(copy_kernel, (1,), META, x, x, TILE=arguments[0], num_warps=1)


def test_the_gate_compiles_what_is_not_in_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine, path, seen = Copies(), tmp_path / "record.json", []

    def compile_none(jobs: list[inspect.Job], workers: int) -> list[inspect.Result]:
        seen.append([job.call for job in jobs])
        return [inspect.Result(job, None, "does not compile" * (job.call == "tile64")) for job in jobs]

    monkeypatch.setattr(inspect, "engines", lambda: (engine,))
    monkeypatch.setattr(inspect, "_compile_with_progress", compile_none)
    monkeypatch.setattr(inspect.Result, "faults", property(lambda result: [result.error] if result.error else []))

    def gate(*arguments: str) -> int:
        return inspect.main(["--arch", "90", *arguments])

    assert gate("--record", str(path)) == 0
    assert gate("--compiled", str(path)) == 0
    engine.tiles = (16, 32, 64)
    assert gate("--compiled", str(path), "--filter", "tile16") == 1  # whatever is chosen: nobody compiled it
    assert seen == [["tile16", "tile32"], ["tile64"]]
    assert "sm_90: 2 of 3 kernels are as they were" in capsys.readouterr().out
    assert gate("--compiled", str(path), "--record", str(path)) == 1
    assert gate("--compiled", str(path)) == 1  # what has a fault is in no record; what was in it still is
    assert sorted(Record.read(path).kernels.values()) == [
        f"linear.copy tile{n} sm_90 warps 1 stages 1" for n in (16, 32)
    ]
    Record({90: "Triton 0.1"}, Record.read(path).kernels).write(path)
    assert gate("--compiled", str(path), "--filter", "tile16") == 0
    assert seen[2:] == [["tile64"], ["tile64"], ["tile16"]]
    assert "the record was made by Triton 0.1" in capsys.readouterr().out
