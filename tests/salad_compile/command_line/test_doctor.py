from __future__ import annotations

import importlib.metadata
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from salad_compile.command_line import NO, WRONG, checkup
from salad_compile.command_line.caches import Cache
from salad_compile.command_line.checkup import FAULT, FINE, MISSING, WARNING, Checkup, Finding
from tests.salad_compile.command_line.conftest import Run


def finding(findings: Any, subject: str) -> Any:
    return next(f for f in findings if (f["subject"] if isinstance(f, dict) else f.subject) == subject)


def test_this_machine_is_well(command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in checkup.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    outcome = command("doctor", "--run", "--json")
    found = outcome.json()
    assert [f for f in found["findings"] if f["status"] == FAULT] == []
    assert (outcome.code, found["healthy"]) == (0, True)
    assert finding(found["findings"], "torch")["detail"] == torch.__version__
    assert "engine torch" in finding(found["findings"], "cpu")["detail"]
    assert finding(found["findings"], 'backend "salad"')["status"] == FINE
    assert finding(found["findings"], "run on cpu")["status"] == FINE


def test_a_fault_is_a_no(command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkup, "examine", lambda run: Checkup((Finding("torch", FAULT, "too old", "a newer one"),)))
    outcome = command("doctor")
    assert outcome.code == NO
    assert "too old" in outcome.out
    assert "1 fault, 0 warnings" in outcome.out


@pytest.mark.parametrize(("name", "expected"), [("TORCH_COMPILE_DISABLE", FAULT), ("TRITON_INTERPRET", WARNING)])
def test_variables_that_change_what_runs(name: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in checkup.VARIABLES:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "0")
    assert list(checkup._environment()) == []
    monkeypatch.setenv(name, "1")
    (found,) = checkup._environment()
    assert (found.subject, found.status) == (name, expected)


def test_packages_are_held_against_our_own_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version
    wrong = {"safetensors": "0.1", "diffusers": "0.1"}

    def version(name: str) -> str:
        if name in ("pyarrow", "av"):
            raise importlib.metadata.PackageNotFoundError(name)
        return wrong.get(name) or real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    findings = list(checkup._packages())
    states = {name: finding(findings, name).status for name in ("torch", "safetensors", "diffusers", "pyarrow", "av")}
    assert states == {"torch": FINE, "safetensors": FAULT, "diffusers": WARNING, "pyarrow": MISSING, "av": MISSING}
    assert "salad-compile[train]" in finding(findings, "pyarrow").mend
    assert "salad-compile[clips]" in finding(findings, "av").mend
    assert "salad-compile[diffusers]" in finding(findings, "diffusers").mend


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    (found,) = checkup._compilers()
    assert (found.status, "g++" in found.mend) == (FAULT, True)


def test_an_old_gpu_is_a_fault_with_the_engine_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    from salad_compile.kernels import capability

    class Turing:
        name, total_memory, major, minor = "T4", 16 * 2**30, 7, 5

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Turing)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "T4")
    monkeypatch.setattr(capability, "arch_of", lambda device: (7, 5))
    found = checkup._gpu(torch.device("cuda", 0))
    assert found.status == FAULT
    assert "use_engine('torch')" in found.mend
    monkeypatch.setattr(capability, "arch_of", lambda device: (9, 0))
    assert checkup._gpu(torch.device("cuda", 0)).status == FINE


def test_a_driver_without_a_cuda_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert checkup._no_gpu(None).status == FAULT
    assert "without CUDA" in checkup._no_gpu(None).detail


def test_a_check_that_fails_is_a_finding() -> None:
    def _broken() -> Any:
        yield Finding("first", FINE, "")
        raise RuntimeError("no driver")

    first, second = checkup._catch(_broken)
    assert first.subject == "first"
    assert (second.subject, second.status) == ("broken", FAULT)
    assert "RuntimeError: no driver" in second.detail


def test_caches_with_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor's place is asked for with a private function: it must follow the public variable."""
    (tmp_path / "inductor").mkdir()
    (tmp_path / "inductor" / "graph").write_bytes(bytes(3 * 2**20))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setenv("SALAD_CACHE_DIR", str(tmp_path / "ours"))
    findings = list(checkup._caches())
    assert finding(findings, "Inductor's cache").detail.startswith(f"{tmp_path / 'inductor'}, 3.0 MiB")
    assert finding(findings, "tuned kernels").detail.startswith(f"{tmp_path / 'ours'}, not there yet")


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert checkup._cache(Cache("cache", tmp_path, "x")).status == WARNING


def test_what_is_installed_and_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a wheel for another libstdc++, or half a deletion: the metadata say that all is well."""
    real = importlib.import_module

    def import_module(name: str) -> Any:
        if name in ("safetensors", "diffusers"):
            raise ImportError("libfoo.so.1: cannot open shared object file\nmore")
        return real(name)

    monkeypatch.setattr(importlib, "import_module", import_module)
    findings = list(checkup._packages())
    assert finding(findings, "safetensors").status == FAULT
    assert finding(findings, "diffusers").status == WARNING
    assert finding(findings, "diffusers").detail.endswith("ImportError: libfoo.so.1: cannot open shared object file")
    assert finding(findings, "huggingface-hub").status == FINE


def test_caches_are_emptied_on_request_and_nothing_else(
    tmp_path: Path, command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the user gave a folder with things of his own."""
    kept = [tmp_path / name for name in ("inductor/notes.txt", "triton/model/weights", "ours/other.json")]
    gone = [
        *(tmp_path / "inductor" / name for name in ("ab/graph.py", "fxgraph/x/y", "aotautograd/z")),
        tmp_path / "triton" / ("AB" * 26) / "kernel.cubin",
        tmp_path / "ours" / "tuning.json",
    ]
    for path in (*kept, *gone):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(2**20))
    for variable, name in (("TORCHINDUCTOR", "inductor"), ("TRITON", "triton"), ("SALAD", "ours")):
        monkeypatch.setenv(f"{variable}_CACHE_DIR", str(tmp_path / name))
    outcome = command("doctor", "--clear-caches")
    assert outcome.code == 0
    printed = " ".join(outcome.out.split())  # the table wraps where the folder's name is long
    assert "3.0 MiB deleted; left, not of this cache: notes.txt" in printed
    assert all(path.exists() for path in kept)
    assert not any(path.exists() for path in gone)
    assert command("doctor", "--clear-caches", "--run").code == WRONG
