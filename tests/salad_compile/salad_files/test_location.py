"""Where a SALAD file is: downloads that fail say so, and the model is as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

import salad_compile
from salad_compile.errors import CorruptFileError, HubError
from salad_compile.salad_files.location import file_at
from tests.models.zoo import CASES
from tests.salad_compile.conversion.test_convert import assert_unchanged, fingerprint
from tests.support import converted

CASE = CASES["handwritten_fused"]


def failing(error: Exception) -> Any:
    def download(*args: Any, **kwargs: Any) -> str:
        raise error

    return download


class ReadError(Exception):
    """As the HTTP library under huggingface_hub has one: no OSError."""


@pytest.mark.parametrize("error", [ReadError("incomplete body"), ConnectionResetError("peer"), TimeoutError("read")])
def test_a_download_that_breaks_off(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.hf_hub_download", failing(error))
    model = CASE.build()
    before = fingerprint(model)
    with pytest.raises(HubError, match=rf"somebody/salad.*unchanged.*{type(error).__name__}: {error}") as caught:
        salad_compile.load(model, "somebody/salad")
    assert caught.value.__cause__ is error
    assert_unchanged(model, before)


def test_a_repository_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.hf_hub_download", failing(LocalEntryNotFoundError("offline")))
    with pytest.raises(FileNotFoundError, match="neither a file nor a directory"):
        salad_compile.load(CASE.build(), "somebody/salad")


def test_half_of_a_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = salad_compile.save(converted(CASE), tmp_path)
    file.write_bytes(file.read_bytes()[:-100])
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *args: str(file))
    model = CASE.build()
    before = fingerprint(model)
    with pytest.raises(CorruptFileError, match="download"):
        salad_compile.load(model, "somebody/salad")
    assert_unchanged(model, before)


def test_a_directory_is_never_taken_for_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.hf_hub_download", failing(AssertionError("asked the Hub")))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "out" / "transformer").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="no SALAD file"):
        file_at("runs/out")
    (tmp_path / "runs" / "out" / "transformer" / "salad.safetensors").touch()
    with pytest.raises(FileNotFoundError, match="pass runs/out/transformer"):
        file_at("runs/out")
