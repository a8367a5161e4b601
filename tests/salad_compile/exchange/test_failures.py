"""What cannot be exported, or not written, is a clear error, and nothing that was there is lost."""

from __future__ import annotations

import errno
import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn

import salad_compile
from salad_compile.common import files
from salad_compile.errors import (
    BaseModelMismatchError,
    ConfigError,
    ExportError,
    MergeError,
    NotASaladFileError,
    NotConvertedError,
    SaladError,
    WriteError,
)
from tests import toys
from tests.models.registry import ALL_CASES
from tests.models.zoo import CASES
from tests.salad_compile.conversion.test_convert import assert_unchanged, fingerprint
from tests.salad_compile.exchange.test_export_directory import forward, pipeline
from tests.support import converted

CASE = CASES["Wan"]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return converted(CASE)


def content(directory: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in sorted(directory.rglob("*")) if file.is_file()}


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """A disk that is full after so many bytes of one file, as the kernel tells it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# --- what is asked for -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("formats", "message"),
    [
        ("comfy", r"'comfy'.*Did you mean 'comfyui'"),
        (("salad", "peftt"), "Did you mean 'peft'"),
        ((), "no format"),
        (5, "formats are names of salad, .*got 5"),
    ],
)
def test_unknown_formats(formats: Any, message: str, model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        salad_compile.export(model, tmp_path / "out", formats)
    assert not list(tmp_path.iterdir())


def test_facts_that_are_no_dictionary(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="facts of the training are a dictionary"):
        salad_compile.export(model, tmp_path / "out", "salad", training=5)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_nothing_converted(tmp_path: Path) -> None:
    with pytest.raises(NotConvertedError, match="convert"):
        salad_compile.export(CASE.build(), tmp_path / "out")
    with pytest.raises(NotConvertedError, match="convert"):
        salad_compile.export(pipeline(CASE.build()), tmp_path / "out")
    with pytest.raises(ConfigError, match="transformer"):
        salad_compile.export(object(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_format_that_was_asked_for_and_cannot_be_had_is_an_error(tmp_path: Path) -> None:
    without = converted(CASE, lora_rank=0, lora_alpha=None)
    for name in ("diffusers", "comfyui", "peft"):
        with pytest.raises(ExportError, match="no LoRA"):
            salad_compile.export(without, tmp_path / "out", ("salad", name))
    fused = converted(CASES["handwritten_fused"])
    with pytest.raises(ExportError, match=r"WanTransformer3DModel.*FusedDiT"):
        salad_compile.export(fused, tmp_path / "out", "comfyui")
    with pytest.raises(ExportError, match="FusedDiT"):
        salad_compile.export(fused, tmp_path / "out", "diffusers")
    assert not list(tmp_path.iterdir())


def test_lora_inside_an_nn_multihead_attention_would_not_be_applied_by_anybody(tmp_path: Path) -> None:
    report = salad_compile.export(converted(ALL_CASES["handwritten_multihead"]), tmp_path / "out")
    assert [entry.format for entry in report.written] == ["salad"]
    assert "nn.MultiheadAttention" in {entry.format: entry.reason for entry in report.formats}["peft"]


def test_a_quantised_or_adapted_base_is_not_merged(tmp_path: Path) -> None:
    model: Any = converted(CASE)
    model.blocks[1].attn1.to_v = toys.QuantisedLinear(24, 24)
    before = fingerprint(model)
    with pytest.raises(MergeError, match=r"blocks\.1\.attn1\.to_v.*QuantisedLinear"):
        salad_compile.export(model, tmp_path / "out", ("salad", "merged"))
    assert_unchanged(model, before)
    assert not list(tmp_path.iterdir())
    # all that can be had: the rest is there, with the reason
    report = salad_compile.export(model, tmp_path / "out")
    assert {entry.format: "QuantisedLinear" in entry.reason for entry in report.formats if not entry.path} == {
        "merged": True
    }
    adapted: Any = converted(CASE, lora_rank=0, lora_alpha=None)
    import peft

    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["to_q"]), adapted)
    with pytest.raises(MergeError, match="another adapter"):
        salad_compile.export(adapted, tmp_path / "other", "merged")


# --- files in the wrong place ----------------------------------------------------------------------------------------


def test_a_lora_is_no_salad_file_and_the_other_way_round(model: nn.Module, tmp_path: Path) -> None:
    salad_compile.export(model, tmp_path / "out")
    base = CASE.build()
    before, expected = fingerprint(base), forward(base)
    for file in ("lora/pytorch_lora_weights.safetensors", "lora/comfyui_lora.safetensors"):
        with pytest.raises(NotASaladFileError, match="load_lora_weights"):
            salad_compile.load(base, tmp_path / "out" / file)
    assert_unchanged(base, before)
    pipe = pipeline(base)
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):  # diffusers 0.42
        pipe.load_lora_weights(tmp_path / "out" / "salad.safetensors")
    bare = salad_compile.save(converted(CASE, linear_branch=False), tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):  # none of our names contains "lora"
        pipe.load_lora_weights(bare)
    assert not pipe.get_active_adapters()
    assert torch.equal(forward(base), expected)


def test_another_base_model(model: nn.Module, tmp_path: Path) -> None:
    salad_compile.export(model, tmp_path / "out", ("salad", "merged"))
    other = CASES["handwritten_fused"].build()
    for folder in ("out", "out/transformer"):
        with pytest.raises(BaseModelMismatchError, match=r"WanTransformer3DModel.*FusedDiT"):
            salad_compile.load(other, tmp_path / folder)


# --- the disk --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("formats", [("salad",), ("peft",), ("merged",)])
def test_a_full_disk_loses_nothing(formats: tuple[str, ...], model: nn.Module, tmp_path: Path) -> None:
    target = tmp_path / "out"
    salad_compile.export(model, target, "salad")
    before = content(tmp_path)
    with room_for(4096), pytest.raises(WriteError, match="could not be written") as caught:
        salad_compile.export(model, target, formats)
    assert caught.value.errno == errno.EFBIG
    assert isinstance(caught.value, OSError)
    assert isinstance(caught.value, SaladError)
    assert content(tmp_path) == before
    with room_for(4096), pytest.raises(WriteError):
        salad_compile.export(model, tmp_path / "new", formats)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    with room_for(4096), pytest.raises(WriteError):
        salad_compile.save(model, target)
    assert content(tmp_path) == before


def test_a_rename_that_fails_puts_the_earlier_export_back(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    salad_compile.export(model, target, "salad")
    before, rename = content(tmp_path), Path.rename

    def refusing(self: Path, to: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return rename(self, to)

    monkeypatch.setattr(files, "exchange", lambda one, other: False)  # as on systems that cannot
    monkeypatch.setattr(Path, "rename", refusing)
    with pytest.raises(WriteError, match="No space left on device") as caught:
        salad_compile.export(model, target, "salad")
    assert caught.value.errno == errno.ENOSPC
    assert content(tmp_path) == before


def test_a_directory_that_cannot_be_written(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for target in (file, file / "out"):
        with pytest.raises(WriteError):
            salad_compile.export(model, target)
    with pytest.raises(WriteError):
        salad_compile.save(model, file / "salad.safetensors")

    def read_only(self: Path, *args: Any, **kwargs: Any) -> None:  # chmod does not stop root
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(WriteError, match="Permission denied") as caught:
        salad_compile.export(model, tmp_path / "out")
    assert caught.value.errno == errno.EACCES
    assert content(tmp_path) == {str(file): b"mine"}


def test_what_no_export_wrote_is_not_replaced(model: nn.Module, tmp_path: Path) -> None:
    """A diffusers checkpoint has a `transformer` as well."""
    for names, message in ((["vae", "transformer"], "vae, which no export wrote"), (["transformer"], "salad_config")):
        target = tmp_path / names[0]
        for name in names:
            (target / name).mkdir(parents=True)
            (target / name / "weights").write_text("mine")
        before = content(tmp_path)
        with pytest.raises(WriteError, match=message):
            salad_compile.export(model, target)
        assert content(tmp_path) == before
    empty = tmp_path / "empty"
    empty.mkdir()
    salad_compile.export(model, empty, "salad")
    assert json.loads((empty / "salad_config.json").read_text())["base_class"] == "WanTransformer3DModel"
