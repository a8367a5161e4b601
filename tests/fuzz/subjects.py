"""What is damaged, and how it is read: each subject writes a directory and digests what reading it gives.

What a file of another program says cannot be told from what it should say where it has no checksum: of latents in the
formats of others only files that this package wrote are compared, and of configurations only that no code runs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import salad_compile
from salad_compile.command_line.model_source import load_model
from salad_compile.common.tensor_files import digest_of
from salad_compile.latents import WAN_2_1, convert_latents, open_latents, write_latents
from salad_compile.sites.branch import branches
from salad_compile.training import train
from tests.models.zoo import CASES
from tests.salad_compile.latents.data import make_items, write_finetrainers
from tests.salad_compile.latents.test_caches import WRITERS
from tests.salad_compile.training import tiny
from tests.support import converted

ARCHIVES = ("diffsynth", "ltx")
RUN = dataclasses.replace(tiny.SETTINGS, steps=2, batch=1, micro_batch=1, checkpoint_every=1, warmup_steps=1)


@dataclasses.dataclass(frozen=True)
class Subject:
    """write: fills a directory. read: a digest of what is in it. strict: it must be that of the undamaged directory."""

    write: Callable[[Path], None]
    read: Callable[[Path], str]
    strict: bool = True


_model: Any = None


def fresh_model() -> Any:
    """One base for a process: every case is a fork, which leaves it as it was."""
    global _model
    _model = CASES["Wan"].build() if _model is None else _model
    return _model


def _write_salad(folder: Path) -> None:
    salad_compile.save(converted(CASES["Wan"]), folder / "salad.safetensors")


def read_salad(folder: Path) -> str:
    """Loads into the base; a failed load must leave it as it was."""
    model = fresh_model()
    before = digest_of(model.state_dict(), {})
    try:
        salad_compile.load(model, folder)
    except BaseException:
        assert digest_of(model.state_dict(), {}) == before, "a failed load has changed the model"
        assert not branches(model), "a failed load has left branches"
        raise
    configs = repr([(branch.record, branch.config) for branch in branches(model).values()])
    return digest_of(model.state_dict(), {"configs": configs})


def _write_latents(layout: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        if layout == "finetrainers":
            write_finetrainers(folder, make_items(3))
        elif layout in WRITERS:
            WRITERS[layout](folder, make_items(3))
        elif layout == "salad":
            write_latents(make_items(3), folder, statistics=WAN_2_1)
        else:
            source = folder.with_name(f"{folder.name}-source")
            write_latents(make_items(3), source, statistics=WAN_2_1)
            convert_latents(source, folder, to=layout, progress=False)

    return write


def read_latents(folder: Path) -> str:
    """Every value, name and caption of every item."""
    found = hashlib.sha256()
    for item in open_latents(folder, sample=0):
        found.update(repr((item.name, item.caption, item.fps)).encode())
        found.update(digest_of({"latent": item.latent, "text": item.text}, {}).encode())
    return found.hexdigest()


def _write_run(folder: Path) -> None:
    tiny.latents(folder.with_name("given"), 3)
    train(tiny.converted(), open_latents(folder.with_name("given"), sample=0), RUN, folder)


def read_run(folder: Path) -> str:
    """Goes on with the run, and reads its result."""
    given = open_latents(folder.with_name("given"), sample=0)
    model = tiny.converted()
    train(model, given, dataclasses.replace(RUN, steps=3), folder)
    return digest_of({name: p for name, p in model.named_parameters() if ".salad." in name}, {})


def _write_config(folder: Path) -> None:
    CASES["Wan"].build().save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):
        weights.unlink()


def read_config(folder: Path) -> str:
    """Only whether code ran: other numbers in it are another model."""
    return type(load_model(folder, meta=True)).__name__


def _write_shards(folder: Path) -> None:
    CASES["Wan"].build().save_pretrained(folder, max_shard_size="30KB")


def read_shards(folder: Path) -> str:
    """The weights of a checkpoint in shards."""
    return digest_of(load_model(folder, dtype=torch.float32).state_dict(), {})


SUBJECTS = {
    "salad": Subject(_write_salad, read_salad),
    **{
        f"latents-{layout}": Subject(_write_latents(layout), read_latents)
        for layout in ("salad", "musubi", "fastvideo", "finetrainers")
    },
    # archives of torch have checksums, the others none
    **{f"latents-{name}": Subject(_write_latents(name), read_latents, strict=name in ARCHIVES) for name in WRITERS},
    "run": Subject(_write_run, read_run),
    "config": Subject(_write_config, read_config, strict=False),
    "index": Subject(_write_shards, read_shards),
}
# of a checkpoint of diffusers only the index: its shards are read by diffusers, and have no checksum
FILES = {"config": "config.json", "index": "*.index.json"}


def copy_of(original: Path, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(original, folder)
    return folder
