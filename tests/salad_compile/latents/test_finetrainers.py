"""finetrainers' precomputed items: moments, the reciprocal of the std, and no code from a pickle."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from salad_compile.errors import ConfigError, LatentItemError
from salad_compile.latents import WAN_2_1, open_latents
from tests.salad_compile.latents.data import make_items, write_finetrainers


def test_reads_the_mean_of_the_posterior(tmp_path: Path) -> None:
    items = make_items(11)
    latents = open_latents(write_finetrainers(tmp_path, items))
    assert (latents.layout, latents.normalized, latents.statistics) == ("finetrainers", False, WAN_2_1)
    assert latents.names == [f"latent-0-{number}" for number in range(11)]  # by number: 10 comes last
    for item, read in zip(items, latents, strict=True):
        assert torch.equal(read.latent, WAN_2_1.normalize(WAN_2_1.denormalize(item.latent)))
        assert torch.equal(read.text, item.text)


def test_damage_is_named(tmp_path: Path) -> None:
    write_finetrainers(tmp_path, make_items(4))
    (tmp_path / "condition-0-0.pt").unlink()
    file = tmp_path / "latent-0-1.pt"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(
        LatentItemError, match=r"2 damaged items: latent-0-0: .*condition-0-0.*latent-0-1: .*cannot be read"
    ):
        open_latents(tmp_path)
    torch.save({"other": torch.ones(1)}, tmp_path / "condition-0-2.pt")
    latents = open_latents(tmp_path, on_error="skip", sample=0)
    assert [item.name for item in latents] == ["latent-0-3", "latent-0-3"]


class Payload:
    def __reduce__(self) -> Any:
        return print, ("executed",)


def test_no_code_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_finetrainers(tmp_path, make_items(2))
    torch.save({"latents": Payload()}, tmp_path / "latent-0-0.pt")
    assert open_latents(tmp_path, on_error="skip", sample=0).names == ["latent-0-1"]
    assert "executed" not in capsys.readouterr().out
    pickle.loads(pickle.dumps(Payload()))
    assert "executed" in capsys.readouterr().out  # it would have


def test_another_vae_needs_its_statistics(tmp_path: Path) -> None:
    write_finetrainers(tmp_path, make_items(1))
    values = torch.load(tmp_path / "latent-0-0.pt", weights_only=True)
    torch.save({**values, "latents_mean": values["latents_mean"] + 1}, tmp_path / "latent-0-0.pt")
    with pytest.raises(ConfigError, match="pass statistics="):
        open_latents(tmp_path)
