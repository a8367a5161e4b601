"""What docs/security.md promises, one test for each promise; the page names its test in the last column."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import salad_compile
from salad_compile.command_line.model_source import load_model
from salad_compile.common.inside import inside
from salad_compile.errors import CorruptFileError, LatentItemError, ModelSourceError
from salad_compile.latents import open_latents, write_latents
from tests.models.zoo import CASES
from tests.salad_compile.latents import data
from tests.support import converted

ROOT = Path(__file__).parents[1]
ATTACKS = (
    "os:system",
    "trap.py:Trap",
    "trap:Trap",
    "os.system",
    "builtins:exec",
    "diffusers:logging",
    "../trap.py:Trap",
)


class Payload:
    """Pickled, it runs a command when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with code that leaves `mark` behind when it runs; the path of `mark`."""
    mark = tmp_path / "mark"
    (tmp_path / "trap.py").write_text(
        f"from pathlib import Path\nimport torch\nPath({str(mark)!r}).mkdir()\nclass Trap(torch.nn.Module): pass\n"
    )
    monkeypatch.chdir(tmp_path)
    return mark


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("random", [True, False])
def test_a_configuration_imports_nothing(name: str, random: bool, trap: Path) -> None:
    config = {"_class_name": name, "command": f"mkdir {trap}", "_diffusers_version": "0.1"}
    folder = trap.parent / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for source in (folder, folder / "config.json"):
        with pytest.raises(ModelSourceError):
            load_model(source, random=random)
    assert not trap.exists()


def test_what_is_no_model_of_diffusers_is_refused(tmp_path: Path) -> None:
    for name in ("AutoModel", "DDIMScheduler", "WanPipeline", "utils", "logging", "ModelMixin_"):
        (tmp_path / "config.json").write_text(json.dumps({"_class_name": name}))
        with pytest.raises(ModelSourceError, match="has no model class"):
            load_model(tmp_path, random=True)


def test_only_the_callers_own_class_runs_and_it_is_said(trap: Path, caplog: pytest.LogCaptureFixture) -> None:
    (trap.parent / "config.json").write_text("{}")
    load_model(trap.parent / "config.json", random=True, class_name=f"{trap.parent}/trap.py:Trap")
    assert trap.exists()
    assert "the code of" in caplog.text
    with pytest.raises(ModelSourceError, match="not a class of models"):
        load_model(trap.parent / "config.json", random=True, class_name="os:system")


def test_pickles_do_not_run(trap: Path) -> None:
    items = data.make_items(2)
    folder = data.write_finetrainers(trap.parent / "data", items)
    torch.save({"latents": Payload(trap)}, folder / "latent-0-0.pt")
    (folder / "condition-0-1.pt").write_bytes(pickle.dumps(Payload(trap)))
    with pytest.raises(LatentItemError):
        open_latents(folder)
    model = CASES["Wan"].build()
    model.save_pretrained(trap.parent / "model", safe_serialization=False)
    torch.save({"weight": Payload(trap)}, next((trap.parent / "model").glob("*.bin")))
    with pytest.raises(ModelSourceError):
        load_model(trap.parent / "model")
    assert not trap.exists()


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/../../outside.safetensors"])
def test_an_index_of_weights_stays_in_its_directory(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    CASES["Wan"].build().save_pretrained(folder)
    weights = folder / "diffusion_pytorch_model.safetensors"
    shutil.copy(weights, tmp_path / "outside.safetensors")
    weights.unlink()
    keys = dict.fromkeys(CASES["Wan"].build().state_dict(), name)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": keys}))
    (folder / "other.safetensors").write_bytes(b"")
    with pytest.raises(ModelSourceError, match="leads out of"):
        load_model(folder, dtype=torch.float32)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "items/../../secret.safetensors", "", "a\0b"])
def test_an_index_of_latents_stays_in_its_directory(name: str, tmp_path: Path) -> None:
    folder = write_latents(data.make_items(2), tmp_path / "data")
    first = folder / "items" / "clip0.safetensors"
    shutil.copy(first, tmp_path / "secret.safetensors")
    index = folder / "items.jsonl"
    index.write_text(index.read_text().replace("items/clip0.safetensors", json.dumps(name)[1:-1]))
    with pytest.raises(salad_compile.SaladError):
        open_latents(folder)


@pytest.mark.parametrize("layout", ["salad", "musubi", "finetrainers", "fastvideo"])
def test_links_of_latents_do_not_lead_out(layout: str, tmp_path: Path) -> None:
    folder, items = tmp_path / "data", data.make_items(2)
    if layout == "salad":
        write_latents(items, folder)
    else:
        getattr(data, f"write_{layout}")(folder, items)
    kinds = {
        "salad": "*.safetensors",
        "musubi": "*_wan.safetensors",
        "finetrainers": "latent*",
        "fastvideo": "*.parquet",
    }
    target = sorted(folder.rglob(kinds[layout]))[0]
    inner = target.with_name(f"hidden{target.name}x")
    target.rename(inner)
    target.symlink_to(inner.name)  # a link inside is followed
    assert len(open_latents(folder)) == 2
    outside = tmp_path / target.name
    inner.rename(outside)
    target.unlink()
    target.symlink_to(outside)
    with pytest.raises(LatentItemError, match="leads out of"):
        open_latents(folder)


def test_links_of_salad_directories_do_not_lead_out(tmp_path: Path) -> None:
    file = salad_compile.save(converted(CASES["Wan"]), tmp_path / "other.safetensors")
    (tmp_path / "run").mkdir()
    link = tmp_path / "run" / "salad.safetensors"
    link.symlink_to(file)
    with pytest.raises(CorruptFileError, match="leads out of"):
        salad_compile.load(CASES["Wan"].build(), tmp_path / "run")
    salad_compile.load(CASES["Wan"].build(), link)  # named by the caller


def test_snapshots_of_the_hub_are_read(tmp_path: Path) -> None:
    """Their files are links to the blobs of the same repository, and to nothing else."""
    repository = tmp_path / "models--somebody--wan"
    snapshot = repository / "snapshots" / "0a1b"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    salad_compile.save(converted(CASES["Wan"]), repository / "blobs" / "f00")
    (snapshot / "salad.safetensors").symlink_to("../../blobs/f00")
    salad_compile.load(CASES["Wan"].build(), snapshot)
    (snapshot / "salad.safetensors").unlink()
    (snapshot / "salad.safetensors").symlink_to(salad_compile.save(converted(CASES["Wan"]), tmp_path / "outside"))
    with pytest.raises(CorruptFileError, match="leads out of"):
        salad_compile.load(CASES["Wan"].build(), snapshot)


def test_circles_of_links_are_named(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(ValueError, match="cannot be followed"):
        inside(tmp_path, "a")


def test_writing_replaces_links(tmp_path: Path) -> None:
    """What a link in a target directory leads to is never written to."""
    precious = tmp_path / "precious"
    precious.write_text("kept")
    target = tmp_path / "salad.safetensors"
    target.symlink_to(precious)
    salad_compile.save(converted(CASES["Wan"]), target)
    assert precious.read_text() == "kept"
    assert not target.is_symlink()


def test_every_promise_has_its_test() -> None:
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    named = re.findall(r"`(test_\w+)`", page)
    assert len(named) > 10
    known = {
        name for file in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", file.read_text())
    }
    assert set(named) <= known
    here = {name for name in globals() if name.startswith("test_")} - {"test_every_promise_has_its_test"}
    assert here <= set(named)
