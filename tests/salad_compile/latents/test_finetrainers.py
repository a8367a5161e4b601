"""finetrainers' precomputed items: moments, the reciprocal of the std, and no code from a pickle."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from salad_compile.errors import ConfigError, LatentItemError
from salad_compile.latents import WAN_2_1, LatentStatistics, open_latents
from tests.salad_compile.latents.data import make_item, make_items, write_finetrainers


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


def test_the_files_statistics_are_taken_and_compared(tmp_path: Path) -> None:
    items = make_items(2)
    write_finetrainers(tmp_path, items)
    for number in range(2):
        values = torch.load(tmp_path / f"latent-0-{number}.pt", weights_only=True)
        values["latents_mean"] += 1
        torch.save(values, tmp_path / f"latent-0-{number}.pt")
    other = LatentStatistics(tuple(mean + 1 for mean in WAN_2_1.mean), WAN_2_1.std)
    latents = open_latents(tmp_path, sample=0)
    assert latents.statistics is not None
    assert latents.statistics.is_close(other)
    torch.testing.assert_close(latents[0].latent, other.normalize(WAN_2_1.denormalize(items[0].latent)))
    with pytest.raises(
        ConfigError, match=r"and the VAE of the model with the statistics of wan2.1: they are of another"
    ):
        open_latents(tmp_path, vae=WAN_2_1)
    write_finetrainers(tmp_path, items[:1])
    with pytest.raises(LatentItemError, match=r"latent-0-1: it has statistics of 16 channels .*: items of two VAEs"):
        open_latents(tmp_path)


def test_names_of_since_april_2025(tmp_path: Path) -> None:
    items = make_items(11)
    folder = tmp_path / "finetrainers-precomputed-data"
    write_finetrainers(folder, items)
    for file in list(folder.iterdir()):
        file.rename(folder / file.name.replace("-0-", "-", 1))
    for place in (folder, tmp_path):
        latents = open_latents(place)
        assert latents.names == [f"latent-{number}" for number in range(11)]
        torch.testing.assert_close(latents[10].latent, items[10].latent)


def test_other_models(tmp_path: Path) -> None:
    """LTX-Video has std as it is; HunyuanVideo and CogVideoX state nothing, and their VAE is asked for."""
    draw = torch.Generator().manual_seed(0)
    raw, mean, std = torch.randn(1, 16, 3, 4, 5, generator=draw), torch.rand(8, generator=draw), torch.tensor([2.0] * 8)
    text = torch.randn(1, 7, 6, generator=draw)
    ltx = {"latents": raw, "num_frames": 3, "height": 4, "width": 5, "latents_mean": mean, "latents_std": std}
    torch.save(ltx, tmp_path / "latent-0.pt")
    torch.save({"encoder_hidden_states": text, "encoder_attention_mask": text}, tmp_path / "condition-0.pt")
    found = open_latents(tmp_path, sample=0)[0]
    torch.testing.assert_close(found.latent, (raw[0, :8] - mean.view(-1, 1, 1, 1)) / 2)
    torch.save({"latents": raw}, tmp_path / "latent-0.pt")
    torch.save({"prompt_embeds": text}, tmp_path / "condition-0.pt")
    with pytest.raises(ConfigError, match="nothing says how 8 channels are: pass statistics="):
        open_latents(tmp_path)
    vae = LatentStatistics((0.0,) * 8, (2.0,) * 8)
    torch.testing.assert_close(open_latents(tmp_path, vae=vae, sample=0)[0].latent, raw[0, :8] / 2)


def test_conditions_of_image_to_video(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    item = make_item(0)
    write_finetrainers(tmp_path, [item])
    values = torch.load(tmp_path / "latent-0-0.pt", weights_only=True)
    condition, feature = torch.randn(1, 32, 2, 4, 6), torch.randn(1, 5, 3)
    more = {"latent_condition": condition, "encoder_hidden_states_image": feature, "depth": feature}
    torch.save({**values, **more, "latent_condition_mask": torch.ones(1, 4, 2, 4, 6)}, tmp_path / "latent-0-0.pt")
    found = open_latents(tmp_path)[0]
    assert torch.equal(found.extras["clip_feature"], feature[0])
    torch.testing.assert_close(found.extras["first_frame_latent"], WAN_2_1.normalize(condition[0, :16]))
    assert "not read: depth" in caplog.text
