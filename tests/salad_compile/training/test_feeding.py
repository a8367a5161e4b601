"""Reading what a run is fed: what is damaged is named, in whichever process it is read."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from salad_compile.errors import LatentItemError
from salad_compile.latents import open_latents
from salad_compile.training import train
from tests.salad_compile.training.tiny import SETTINGS, converted, latents

RUN = dataclasses.replace(SETTINGS, steps=6, checkpoint_every=1)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", ["other values", "gone"])
def test_a_damaged_item_is_named_and_the_run_goes_on_without_it(damage: str, workers: int, tmp_path: Path) -> None:
    latents(tmp_path / "data", 20)
    data, careful = open_latents(tmp_path / "data"), open_latents(tmp_path / "data", on_error="skip")
    file = tmp_path / "data" / "items" / "clip1.safetensors"  # is in no sample
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-8] + b"\xff" * 8)
    settings = dataclasses.replace(RUN, workers=workers)
    with pytest.raises(LatentItemError, match=r"^clip1: .*checkpoints are as they were.*train --skip") as told:
        train(converted(), data, settings, tmp_path / "run")
    assert "Traceback" not in str(told.value)
    assert train(converted(), careful, settings, tmp_path / "run").finished
