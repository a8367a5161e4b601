"""musubi-tuner's caches: pairs of files, clips and images, and what can be missing or wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from salad_compile.common.tensor_files import DIGEST_KEY
from salad_compile.errors import LatentItemError, LatentLayoutError
from salad_compile.latents import WAN_2_1, convert_latents, open_latents, write_latents
from tests.salad_compile.latents.data import make_item, make_items, write_musubi


@pytest.mark.parametrize("clips", [True, False])
def test_reads_pairs(tmp_path: Path, clips: bool) -> None:
    items = make_items(3)
    latents = open_latents(write_musubi(tmp_path, items, clips=clips))
    assert (latents.layout, latents.normalized) == ("musubi", True)
    assert latents.names == [f"{item.name}_00000-005" if clips else item.name for item in items]
    for item, read in zip(items, latents, strict=True):
        assert torch.equal(read.latent, item.latent)
        assert torch.equal(read.text, item.text)
        assert read.caption == item.caption


def test_other_tensors_of_a_cache_and_bfloat16(tmp_path: Path) -> None:
    write_musubi(tmp_path, [make_item(0)])
    file = tmp_path / "clip0_00000-005_0048x0032_wan.safetensors"
    latent = load_file(file)["latents_2x4x6_float32"].bfloat16()
    others = {"clip_bfloat16": torch.ones(3), "latents_image_2x4x6_bfloat16": torch.ones(20, 2, 4, 6)}
    save_file({"latents_2x4x6_bfloat16": latent, **others}, file, metadata={"architecture": "wan"})
    read = open_latents(tmp_path)[0]
    assert torch.equal(read.latent, latent.float())


def test_two_resolutions_of_one_video_share_a_text_and_not_a_name(tmp_path: Path) -> None:
    item = make_item(0)
    write_musubi(tmp_path, [item])
    other = tmp_path / "clip0_00000-005_0024x0016_wan.safetensors"
    save_file({"latents_2x2x3_float32": torch.randn(16, 2, 2, 3)}, other, metadata={"architecture": "wan"})
    latents = open_latents(tmp_path, sample=0)
    assert len(set(latents.names)) == 2
    assert latents.shapes == [(16, 2, 2, 3), (16, 2, 4, 6)]
    assert all(torch.equal(read.text, item.text) for read in latents)


def test_damage_is_named(tmp_path: Path) -> None:
    write_musubi(tmp_path, make_items(7))

    def latent(number: int) -> Path:
        return tmp_path / f"clip{number}_00000-005_0048x0032_wan.safetensors"

    (tmp_path / "clip0_wan_te.safetensors").unlink()
    latent(1).write_bytes(latent(1).read_bytes()[:-4])
    save_file({"something": torch.ones(2)}, latent(2))
    save_file({"latents_3x4x6_float32": torch.ones(16, 2, 4, 6)}, latent(3))
    save_file({"varlen_t5_float32": torch.ones(0, 8)}, tmp_path / "clip4_wan_te.safetensors")
    save_file({"llm_float32": torch.ones(2, 8)}, tmp_path / "clip5_wan_te.safetensors")
    with pytest.raises(LatentItemError, match=r"6 damaged items: .*and 1 more"):
        open_latents(tmp_path)
    latents = open_latents(tmp_path, on_error="skip", sample=0)
    assert latents.names == ["clip6_00000-005"]
    reasons = [problem.reason for problem in latents.problems]
    expected = [
        "no clip0_wan_te",
        "truncated",
        "latents_FxHxW_dtype, there are something",
        "latents_3x4x6",
        "one token",
    ]
    assert all(part in reason for part, reason in zip([*expected, "varlen_t5_dtype"], reasons, strict=True))


def test_caches_of_another_model_are_not_taken_for_wan(tmp_path: Path) -> None:
    for kind in ("hv", "hv_te"):
        save_file({"x": torch.ones(1)}, tmp_path / f"clip_00000-005_0048x0032_{kind}.safetensors")
    with pytest.raises(LatentLayoutError, match=r"caches of musubi-tuner for hv\?.*Supported: .*_wan.safetensors"):
        open_latents(tmp_path)


def test_conditions_are_extras(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_musubi(tmp_path, make_items(1))
    (file,) = tmp_path.glob("*x0032_wan.safetensors")
    more = {
        "latents_image_2x4x6_float32": torch.randn(20, 2, 4, 6),
        "latents_control_2x4x6_bfloat16": torch.randn(16, 2, 4, 6).bfloat16(),
        "clip_float32": torch.randn(1, 5, 3),
        "f_indices_int32": torch.tensor([0, 1], dtype=torch.int32),
        "mask_weights": torch.ones(2),
    }
    save_file({**load_file(file), **more}, file, metadata={"architecture": "wan"})
    found = open_latents(tmp_path)[0].extras
    assert torch.equal(found["latents_image"], more["latents_image_2x4x6_float32"])
    assert torch.equal(found["latents_control"], more["latents_control_2x4x6_bfloat16"])
    assert torch.equal(found["clip_feature"], more["clip_float32"][0])
    assert found["f_indices"].tolist() == [0, 1]
    assert "not read: mask_weights" in caplog.text


@pytest.mark.parametrize("file", ["clip0_00000-005_0048x0032_wan.safetensors", "clip0_wan_te.safetensors"])
@pytest.mark.parametrize(("lost", "said"), [(DIGEST_KEY, "salad_digest is missing"), (None, "for which architecture")])
def test_a_file_of_ours_cannot_lose_its_digest_unnoticed(
    tmp_path: Path, file: str, lost: str | None, said: str
) -> None:
    write_latents([make_item(0)], tmp_path / "ours", statistics=WAN_2_1)
    convert_latents(tmp_path / "ours", tmp_path / "caches", to="musubi", progress=False)
    damaged = tmp_path / "caches" / file
    with safe_open(damaged, framework="pt") as content:
        metadata = {name: text for name, text in content.metadata().items() if lost and name != lost}
    save_file(load_file(damaged), damaged, metadata=metadata)
    with pytest.raises(LatentItemError, match=said):
        open_latents(tmp_path / "caches")
