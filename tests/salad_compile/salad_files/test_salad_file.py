"""save and load: exact round trips, and a clear error with an untouched model for each way a file can be wrong."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import salad_compile
from salad_compile.errors import (
    AlreadyConvertedError,
    BaseModelMismatchError,
    ConfigError,
    CorruptFileError,
    DtypeMismatchError,
    ExportError,
    FormatVersionError,
    MissingKeysError,
    NotASaladFileError,
    NotConvertedError,
    SaladError,
    ShapeMismatchError,
    UnexpectedKeysError,
)
from salad_compile.salad_files.contents import describe
from salad_compile.sites.branch import branches
from tests import support, toys
from tests.models.zoo import CASES
from tests.salad_compile.conversion.test_convert import assert_unchanged, fingerprint
from tests.support import TINY, assert_same, randomise_branches, run

CASE = CASES["Wan"]


def converted(name: str = "Wan", **changes: Any) -> nn.Module:
    return support.converted(CASES[name], **changes)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return salad_compile.save(converted(), tmp_path / "salad.safetensors")


@pytest.mark.parametrize("name", ["Wan", "handwritten_fused", "handwritten_inline", "LTX2Video"])
def test_round_trip_into_a_fresh_base_needs_no_inputs(name: str, tmp_path: Path) -> None:
    case, model = CASES[name], converted(name)
    expected = run(model, case.inputs(0), case.output)
    path = salad_compile.save(model, tmp_path)  # a directory
    assert path == tmp_path / "salad.safetensors"
    fresh = case.build()
    assert salad_compile.load(fresh, tmp_path) is fresh
    assert_same(run(fresh, case.inputs(0), case.output), expected, bound=0, gradient_bound=0)
    assert describe(fresh) == describe(model)


def test_loading_into_a_converted_model(file: Path) -> None:
    model = converted()
    randomise_branches(model, seed=7)
    pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
    salad_compile.load(model, file)
    expected = run(converted(), CASE.inputs(0), CASE.output)
    assert_same(run(model, CASE.inputs(0), CASE.output), expected, bound=0, gradient_bound=0)
    assert pointers == {name: p.data_ptr() for name, p in model.named_parameters()}


def test_the_file_holds_exactly_the_branch_state(file: Path) -> None:
    model = converted()
    tensors = load_file(file)
    assert tensors.keys() == {name for name in model.state_dict() if ".salad." in name}
    with safe_open(file, framework="pt") as content:
        header = json.loads(content.metadata()["salad_config"])
    assert header["format_version"] == 5
    assert header["base_class"] == "WanTransformer3DModel"
    assert header["config"] == TINY.to_dict()
    assert header["grid"] == {"kind": "latent", "names": ["hidden_states"], "axes": [2, 3, 4], "patch": [1, 2, 2]}
    assert [site["owner"] for site in header["sites"]] == ["blocks.0.attn1", "blocks.1.attn1"]


def test_wrappers_leave_no_trace_in_the_file(file: Path, tmp_path: Path) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = converted()
    model.blocks[0].attn1 = checkpoint_wrapper(model.blocks[0].attn1)  # what trainers do, around the owner itself
    model.blocks[1] = torch.compile(model.blocks[1], backend="salad")
    wrapped = torch.compile(model, backend="salad")
    path = salad_compile.save(wrapped, tmp_path / "wrapped.safetensors")
    expected, actual = load_file(file), load_file(path)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    salad_compile.load(wrapped, file)
    salad_compile.load(CASE.build(), path)


class OfOneModule(nn.Module):
    """A model's own child may be called as DDP calls what it wraps."""

    def __init__(self) -> None:
        super().__init__()
        self.module = toys.SelfAttention()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.module(x)
        return result


def test_a_child_called_module(tmp_path: Path) -> None:
    base, x = OfOneModule(), torch.randn(1, 160, toys.WIDTH)
    model = salad_compile.convert(copy.deepcopy(base), TINY, example_inputs=(x,))
    randomise_branches(model)
    file = salad_compile.save(model, tmp_path / "salad.safetensors")
    assert torch.equal(salad_compile.load(base, file)(x), model(x))
    assert torch.equal(salad_compile.load(base, file)(x), model(x))  # into a converted one


def test_saving_is_atomic(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()

    def half(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half a file")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", half)
    with pytest.raises(OSError, match="disk full"):
        salad_compile.save(converted(), file)
    assert file.read_bytes() == before
    assert [entry.name for entry in file.parent.iterdir()] == [file.name]


def test_a_slash_at_the_end_makes_a_directory(tmp_path: Path) -> None:
    model = converted()
    file = salad_compile.save(model, f"{tmp_path}/new/")
    assert file == tmp_path / "new" / "salad.safetensors"
    assert describe(salad_compile.load(CASE.build(), tmp_path / "new")) == describe(model)


def with_nan(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        next(iter(branches(model).values())).gate_weight.view(-1)[0] = torch.nan
    return model


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (with_nan, "gate_weight holds NaN or infinity"),
        (lambda model: model.to(torch.float8_e4m3fn), "is torch.float8_e4m3fn"),
        (lambda model: model.to("meta"), "has no values"),
    ],
)
def test_what_load_would_refuse_is_not_written(change: Callable[[Any], Any], said: str, file: Path) -> None:
    before = file.read_bytes()
    model = change(converted())
    with pytest.raises(ExportError, match=said):
        salad_compile.save(model, file)
    with pytest.raises(ExportError, match=said):
        salad_compile.export(model, file.parent / "exported", ["salad"])
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name]


def edited(file: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], None]) -> Path:
    with safe_open(file, framework="pt") as content:
        header = json.loads(content.metadata()["salad_config"])
    tensors = load_file(file)
    header.pop("checked")  # as files of before, which have no digest
    change(tensors, header)
    save_file(tensors, file, metadata={"salad_config": json.dumps(header)})
    return file


def truncated(file: Path) -> Path:
    file.write_bytes(file.read_bytes()[:-100])
    return file


def no_safetensors(file: Path) -> Path:
    file.write_bytes(b"not a safetensors file at all, but long enough to have a header")
    return file


def lora(file: Path) -> Path:
    save_file({"transformer.blocks.0.attn1.to_q.lora_A.weight": torch.randn(2, 2)}, file)
    return file


def flipped(file: Path) -> Path:
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    return file


def without_digest(file: Path) -> Path:
    with safe_open(file, framework="pt") as content:
        metadata = content.metadata()
    metadata.pop("salad_digest")
    save_file(load_file(file), file, metadata=metadata)
    return file


def huge_header(file: Path) -> Path:
    file.write_bytes((2**40).to_bytes(8, "little") + file.read_bytes()[8:])
    return file


KEY = "blocks.1.attn1.salad.proj_weight"
DAMAGES: dict[str, tuple[Callable[[Path], Path], type[SaladError], str]] = {
    "truncated": (truncated, CorruptFileError, "truncated"),
    "no safetensors": (no_safetensors, CorruptFileError, "safetensors"),
    "a LoRA": (lora, NotASaladFileError, "load_lora_weights"),
    "missing tensor": (lambda f: edited(f, lambda t, h: t.__delitem__(KEY)), MissingKeysError, KEY),
    "unexpected tensor": (
        lambda f: edited(f, lambda t, h: t.update({"blocks.7.attn1.salad.gate_bias": torch.ones(1)})),
        UnexpectedKeysError,
        r"blocks\.7",
    ),
    "wrong shape": (
        lambda f: edited(f, lambda t, h: t.update({KEY: torch.ones(3, 3)})),
        ShapeMismatchError,
        r"\(3, 3\).*\(24, 24\)",
    ),
    "newer format": (lambda f: edited(f, lambda t, h: h.update(format_version=6)), FormatVersionError, "version 6"),
    "older format": (
        lambda f: edited(f, lambda t, h: h.update(format_version=3)),
        FormatVersionError,
        "version 3, this release of salad_compile reads 4 and 5",
    ),
    "no grid": (lambda f: edited(f, lambda t, h: h.__delitem__("grid")), CorruptFileError, "grid"),
    "broken grid": (lambda f: edited(f, lambda t, h: h["grid"].update(kind="latents")), CorruptFileError, "latents"),
    "no version": (lambda f: edited(f, lambda t, h: h.__delitem__("format_version")), CorruptFileError, "header"),
    "unknown option": (
        lambda f: edited(f, lambda t, h: h["config"].update(sparsty=0.5)),
        CorruptFileError,
        "sparsty",
    ),
    "no sparsity": (
        lambda f: edited(f, lambda t, h: h["config"].__delitem__("sparsity")),
        CorruptFileError,
        "sparsity",
    ),
    "integers": (lambda f: edited(f, lambda t, h: t.update({KEY: t[KEY].int()})), DtypeMismatchError, "int32"),
    "8 bits": (
        lambda f: edited(f, lambda t, h: t.update({KEY: t[KEY].to(torch.float8_e4m3fn)})),
        DtypeMismatchError,
        "float8",
    ),
    "NaN": (
        lambda f: edited(f, lambda t, h: t[KEY].view(-1)[5].fill_(float("nan"))),
        CorruptFileError,
        f"{KEY} holds NaN",
    ),
    "a huge rank": (
        lambda f: edited(f, lambda t, h: h["config"].update(lora_rank=2**40)),
        ShapeMismatchError,
        "lora_rank 1099511627776",
    ),
    "a flipped value": (flipped, CorruptFileError, "digest"),
    "no digest": (without_digest, CorruptFileError, "salad_digest"),
    "a huge header": (huge_header, CorruptFileError, "header would have"),
    "other class": (
        lambda f: edited(f, lambda t, h: h.update(base_class="LTXVideoTransformer3DModel")),
        BaseModelMismatchError,
        "LTXVideoTransformer3DModel",
    ),
    "other widths": (
        lambda f: edited(f, lambda t, h: h.update(base_digest="0" * 64)),
        BaseModelMismatchError,
        "other widths",
    ),
    "more blocks": (
        lambda f: edited(f, lambda t, h: h["sites"].append({**h["sites"][0], "owner": "blocks.9.attn1"})),
        BaseModelMismatchError,
        "3 sites",
    ),
}


@pytest.mark.parametrize("convert_first", [False, True], ids=["base", "converted"])
@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_files_have_their_own_error_and_leave_the_model(name: str, convert_first: bool, file: Path) -> None:
    damage, error, message = DAMAGES[name]
    damage(file)
    model = converted() if convert_first else CASE.build()
    before = fingerprint(model)
    with pytest.raises(error, match=message):
        salad_compile.load(model, file)
    assert_unchanged(model, before)


@pytest.mark.parametrize("place", ["dense", "out"])
def test_every_name_is_resolved_before_anything_is_attached(place: str, file: Path) -> None:
    def change(tensors: dict[str, torch.Tensor], header: dict[str, Any]) -> None:
        if place == "dense":
            header["dense_projections"] = ["blocks.0.attn2.to_q", "blocks.9.attn2.to_q"]
        else:
            header["sites"][1]["out"] = "blocks.1.attn1.to_nowhere"

    edited(file, change)
    model = CASE.build()
    before = fingerprint(model)
    with pytest.raises(BaseModelMismatchError, match=r"blocks\.9|to_nowhere"):
        salad_compile.load(model, file)
    assert_unchanged(model, before)


def test_a_file_of_other_projections_does_not_fit_a_converted_model(file: Path) -> None:
    def change(tensors: dict[str, torch.Tensor], header: dict[str, Any]) -> None:
        site = header["sites"][0]
        site["query"], site["key"] = site["key"], site["query"]

    edited(file, change)
    model = converted()
    before = fingerprint(model)
    with pytest.raises(BaseModelMismatchError, match="under other names"):
        salad_compile.load(model, file)
    assert_unchanged(model, before)


def test_another_model_is_named(file: Path) -> None:
    for model, message in ((toys.SelfAttention(), "SelfAttention"), (CASES["ChronoEdit"].build(), "ChronoEdit")):
        before = fingerprint(model)
        with pytest.raises(BaseModelMismatchError, match=message):
            salad_compile.load(model, file)
        assert_unchanged(model, before)


def test_another_size_of_the_same_class_is_named(file: Path) -> None:
    smaller = CASE.build()
    smaller.blocks = smaller.blocks[:1]
    with pytest.raises(BaseModelMismatchError, match="2 sites"):
        salad_compile.load(smaller, file)
    assert not branches(smaller)


def test_layers_that_a_file_does_not_know_are_named(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Another size of the same class, again: the file fits, and would leave the last layer dense in silence."""
    larger = CASE.build()
    larger.blocks.append(copy.deepcopy(larger.blocks[0]))
    salad_compile.load(larger, file)
    assert len(branches(larger)) == 2
    assert "nothing for 1 layer like its own, dense now: blocks.2.attn1" in caplog.text


def test_layers_that_a_conversion_left_dense_are_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = salad_compile.save(converted(dense_layers=1), tmp_path)
    salad_compile.load(CASE.build(), path)
    assert "has nothing for" not in caplog.text


def test_another_configuration_is_named(file: Path) -> None:
    model = converted(sparsity=0.5)
    before = fingerprint(model)
    with pytest.raises(AlreadyConvertedError, match=r"sparsity: 0\.5 != 0\.7"):
        salad_compile.load(model, file)
    assert_unchanged(model, before)


def test_unconverted_models_and_pipelines_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NotConvertedError, match="convert"):
        salad_compile.save(CASE.build(), tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())

    class Pipeline:
        transformer = CASE.build()

    with pytest.raises(ConfigError, match=r"pipe\.transformer"):
        salad_compile.save(Pipeline(), tmp_path)
    with pytest.raises(FileNotFoundError, match="no SALAD file"):
        salad_compile.load(CASE.build(), tmp_path / "absent.safetensors")


def test_a_hub_repository_is_loaded_by_its_id(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def download(repository: str, name: str) -> str:
        asked.append((repository, name))
        return str(file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    model = salad_compile.load(CASE.build(), "somebody/wan-salad")
    assert asked == [("somebody/wan-salad", "salad.safetensors")]
    assert len(branches(model)) == 2
