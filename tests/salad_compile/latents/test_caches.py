"""Caches of ai-toolkit, DiffSynth-Studio, diffusion-pipe and LTX-Video-Trainer, written as these write them."""

from __future__ import annotations

import io
import pickle
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from salad_compile.errors import LatentItemError, LatentLayoutError
from salad_compile.latents import LatentItem, convert_latents, open_latents
from salad_compile.latents.statistics import HUNYUAN_VIDEO, WAN_2_1
from tests.salad_compile.latents.data import make_item, make_items

Write = Callable[[Path, Sequence[LatentItem]], Path]
HASH = "A1b2C3d4E5f6G7h8I9j0-_"  # 22 characters, as 16 bytes have in base 64
FEATURE, FRAME = torch.randn(5, 3), torch.randn(16, 2, 4, 6)
CONTEXT = torch.arange(96 * 2 * 4 * 6.0).view(96, 2, 4, 6)  # of VACE


def padded(item: LatentItem, length: int = 12) -> Tensor:
    text = torch.zeros(1, length, item.text.shape[1])
    text[0, : len(item.text)] = item.text
    return text


def write_aitoolkit(folder: Path, items: Sequence[LatentItem]) -> Path:
    for name in ("_latent_cache", "_t_e_cache"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for item in items:
        save_file({"latent": item.latent}, folder / "_latent_cache" / f"{item.name}_{HASH}.safetensors")
        save_file({"text_embed": padded(item)}, folder / "_t_e_cache" / f"{item.name}_{HASH[::-1]}.safetensors")
    return folder


def write_diffsynth(folder: Path, items: Sequence[LatentItem]) -> Path:
    for number, item in enumerate(items):
        (folder / str(number % 2)).mkdir(parents=True, exist_ok=True)
        shared = {"input_latents": item.latent[None], "latents": item.latent[None], "height": 32, "cfg_scale": 1.0}
        shared |= {"y": torch.cat([torch.ones(4, 2, 4, 6), FRAME])[None], "clip_feature": FEATURE[None]}
        shared |= {"vace_context": CONTEXT[None]}
        torch.save((shared, {"context": padded(item)}, {}), folder / str(number % 2) / f"{number}.pth")
    return folder


def write_cache(folder: Path, values: Sequence[dict[str, Any]], per_shard: int = 2) -> None:
    """The database and the shards of diffusion-pipe."""
    folder.mkdir(parents=True)
    connection = sqlite3.connect(folder / "metadata.db")
    connection.execute("CREATE TABLE fingerprint(value)")
    connection.execute("CREATE TABLE items(shard, shard_index)")
    for number, value in enumerate(values):
        shard, place = divmod(number, per_shard)
        if not place:
            connection.execute(f"CREATE TABLE shard_{shard}(offset, size)")
        buffer = io.BytesIO()
        torch.save(value, buffer)
        with (folder / f"shard_{shard}.bin").open("ab") as file:
            connection.execute(f"INSERT INTO shard_{shard} VALUES (?, ?)", (file.tell(), len(buffer.getvalue())))
            file.write(buffer.getvalue())
        connection.execute("INSERT INTO items VALUES (?, ?)", (shard, place))
    connection.commit()
    connection.close()


def write_diffusion_pipe(folder: Path, items: Sequence[LatentItem]) -> Path:
    write_cache(
        folder / "latents",
        [{"latents": item.latent, "mask": None, "y": FRAME, "clip_context": FEATURE} for item in items],
    )
    texts = [{"text_embeddings": padded(item)[0] + 0, "seq_lens": torch.tensor(len(item.text))} for item in items]
    write_cache(folder / "text_embeddings_1", texts, per_shard=3)
    return folder


def write_ltx(folder: Path, items: Sequence[LatentItem]) -> Path:
    for name in ("latents", "conditions"):
        (folder / ".precomputed" / name).mkdir(parents=True)
    for item in items:
        channels, frames, height, width = item.latent.shape
        rows = item.latent.permute(1, 2, 3, 0).reshape(-1, channels)
        sizes = {"num_frames": frames, "height": height, "width": width}
        torch.save({"latents": rows, **sizes}, folder / ".precomputed" / "latents" / f"{item.name}.pt")
        mask = torch.arange(12) < len(item.text)
        text = {"prompt_embeds": padded(item)[0] + 3.0, "prompt_attention_mask": mask}
        text["prompt_embeds"][: len(item.text)] -= 3.0  # padding is no zeros here
        torch.save(text, folder / ".precomputed" / "conditions" / f"{item.name}.pt")
    return folder


WRITERS = {
    "aitoolkit": write_aitoolkit,
    "diffsynth": write_diffsynth,
    "diffusionpipe": write_diffusion_pipe,
    "ltx": write_ltx,
}


@pytest.mark.parametrize("layout", WRITERS)
def test_items_are_those_that_were_cached(tmp_path: Path, layout: str) -> None:
    items = make_items(5)
    data = open_latents(WRITERS[layout](tmp_path / "data", items), sample=0)
    assert (data.layout, data.normalized, len(data)) == (layout, True, 5)
    found = [data[number] for number in range(5)]
    order = [0, 2, 4, 1, 3] if layout == "diffsynth" else range(5)  # by rank
    for here, item in zip(found, (items[number] for number in order), strict=True):
        torch.testing.assert_close(here.latent, item.latent, rtol=0, atol=0)
        torch.testing.assert_close(here.text, item.text, rtol=0, atol=1e-6)
    convert_latents(tmp_path / "data", tmp_path / "ours", progress=False)
    assert torch.equal(open_latents(tmp_path / "ours", sample=0)[3].latent, found[3].latent)


@pytest.mark.parametrize("layout", ["diffsynth", "diffusionpipe"])
def test_conditions_of_image_to_video(tmp_path: Path, layout: str) -> None:
    extras = open_latents(WRITERS[layout](tmp_path, make_items(1)), sample=0)[0].extras
    assert torch.equal(extras["clip_feature"], FEATURE)
    if layout == "diffsynth":
        assert torch.equal(extras["latents_image"][4:], FRAME)
        assert torch.equal(extras["vace_context"], CONTEXT)
    else:
        assert torch.equal(extras["first_frame_latent"], FRAME)


def test_the_models_vae_is_taken_for_what_says_nothing(tmp_path: Path) -> None:
    write_aitoolkit(tmp_path, make_items(1))
    assert open_latents(tmp_path, sample=0).statistics == WAN_2_1
    assert open_latents(tmp_path, sample=0, vae=HUNYUAN_VIDEO).statistics == HUNYUAN_VIDEO


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("code of a file has run",)


@pytest.mark.parametrize("layout", ["diffsynth", "diffusionpipe", "ltx"])
def test_no_code_runs(tmp_path: Path, layout: str, capsys: pytest.CaptureFixture[str]) -> None:
    item = make_item(0)
    evil = {"latents": item.latent, "input_latents": item.latent[None], "evil": Payload()}
    if layout == "diffusionpipe":
        write_cache(tmp_path / "latents", [evil])
        write_cache(tmp_path / "text_embeddings_1", [{"text_embeddings": item.text}])
    else:
        WRITERS[layout](tmp_path, [item])
        (file,) = [each for each in tmp_path.rglob("*.pt*") if "conditions" not in each.parts]
        torch.save((evil, {"context": padded(item)}, {}) if layout == "diffsynth" else evil, file)
    with pytest.raises(LatentItemError, match=r"cannot be read: .*(Unsupported|Weights only|UnpicklingError)"):
        open_latents(tmp_path)
    assert pickle.loads(pickle.dumps(Payload())) is None
    assert capsys.readouterr().out == "code of a file has run\n"  # of the line before: it would have


@pytest.mark.parametrize("layout", WRITERS)
def test_damage_is_named(tmp_path: Path, layout: str) -> None:
    WRITERS[layout](tmp_path, make_items(4))
    kinds = ("*.safetensors", "*.pth", "shard_*.bin", "*.pt")
    files = sorted(file for kind in kinds for file in tmp_path.rglob(kind) if "latents" in str(file) or kind == "*.pth")
    files = files or sorted(tmp_path.rglob("_latent_cache/*"))
    data = bytearray(files[0].read_bytes())
    files[0].write_bytes(data[: len(data) // 2])
    with pytest.raises(LatentItemError, match=r"^[1-4] damaged item"):
        open_latents(tmp_path)


def test_texts_that_cannot_be_told_apart(tmp_path: Path) -> None:
    write_aitoolkit(tmp_path / "a", make_items(2))
    texts = tmp_path / "a" / "_t_e_cache"
    (texts / f"clip0_{HASH}.safetensors").write_bytes((texts / f"clip0_{HASH[::-1]}.safetensors").read_bytes())
    (texts / f"clip1_{HASH[::-1]}.safetensors").unlink()
    with pytest.raises(LatentItemError, match=r"clip0: there are 2 texts of its name.*clip1: its text is missing"):
        open_latents(tmp_path / "a")
    write_diffusion_pipe(tmp_path / "d", make_items(2))
    (tmp_path / "d" / "text_embeddings_1").rename(tmp_path / "d" / "other")
    with pytest.raises(LatentLayoutError, match="has no folders text_embeddings_<i>"):
        open_latents(tmp_path / "d")
    write_cache(tmp_path / "d" / "text_embeddings_1", [{"text_embeddings": torch.ones(2, 8)}] * 3)
    with pytest.raises(LatentLayoutError, match="has 2 latents and 3 texts: nothing says which text is whose"):
        open_latents(tmp_path / "d")
    (tmp_path / "d" / "text_embeddings_1" / "metadata.db").write_bytes(b"no database, but long enough for one" * 40)
    with pytest.raises(LatentLayoutError, match=r"metadata.db cannot be read: file is not a database"):
        open_latents(tmp_path / "d")


def test_several_captions_take_the_first(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    items = make_items(2)
    write_diffusion_pipe(tmp_path / "d", items)
    (tmp_path / "d" / "text_embeddings_1").rename(tmp_path / "other")
    texts = [{"text_embeddings": torch.full((2, 8), float(number + 1))} for number in range(6)]
    write_cache(tmp_path / "d" / "text_embeddings_2", texts)
    assert [float(item.text[0, 0]) for item in map(open_latents(tmp_path / "d").__getitem__, range(2))] == [1.0, 4.0]
    assert "not read: 2 more captions of each item" in caplog.text


@pytest.mark.parametrize(
    ("layout", "folder"), [("ltx", ".precomputed/reference_latents"), ("aitoolkit", "_clip_vision_cache")]
)
def test_folders_that_no_item_is_made_of_are_named(
    tmp_path: Path, layout: str, folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    (WRITERS[layout](tmp_path, make_items(2)) / folder).mkdir()
    open_latents(tmp_path)
    assert f"not read: {Path(folder).name}/" in caplog.text
