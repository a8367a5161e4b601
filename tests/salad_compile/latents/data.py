"""Tiny datasets in the formats of other projects, written as those projects write them and not by our writers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
from safetensors.torch import save_file
from torch import Tensor

from salad_compile.latents import WAN_2_1, LatentItem

SHAPE = (16, 2, 4, 6)


def make_item(number: int, shape: tuple[int, int, int, int] = SHAPE, *, length: int = 0, width: int = 8) -> LatentItem:
    """A normalised latent and a text without padding; every number gives other values."""
    generator = torch.Generator().manual_seed(number)
    latent = torch.randn(shape, generator=generator)
    text = torch.randn((length or 3 + number % 4, width), generator=generator)
    return LatentItem(f"clip{number}", latent, text, f"a caption, number {number}", 16.0)


def make_items(number: int, **options: Any) -> list[LatentItem]:
    return [make_item(index, **options) for index in range(number)]


def same(one: LatentItem, other: LatentItem) -> bool:
    """Bit by bit, name and caption included."""
    return (
        (one.name, one.caption, one.fps) == (other.name, other.caption, other.fps)
        and torch.equal(one.latent, other.latent)
        and one.text.dtype == other.text.dtype
        and torch.equal(one.text, other.text)
    )


def stored_tensor(name: str, tensor: Tensor, dtype: str = "float32") -> dict[str, Any]:
    return {
        f"{name}_bytes": tensor.contiguous().view(torch.uint8).numpy().tobytes(),
        f"{name}_shape": list(tensor.shape),
        f"{name}_dtype": dtype,
    }


def fastvideo_row(item: LatentItem, *, padded_to: int = 12) -> dict[str, Any]:
    """A row of `pyarrow_schema_t2v`: latents of the VAE as they are, text with zeros at its end."""
    text = torch.zeros(padded_to, item.text.shape[1])
    text[: len(item.text)] = item.text
    return {
        "id": item.name,
        **stored_tensor("vae_latent", WAN_2_1.denormalize(item.latent)),
        **stored_tensor("text_embedding", text),
        "file_name": item.name,
        "caption": item.caption,
        "media_type": "video",
        "width": 48,
        "height": 32,
        "num_frames": item.latent.shape[1],
        "duration_sec": 0.5,
        "fps": item.fps,
    }


def write_parquet(file: Path, rows: Sequence[dict[str, Any]], *, row_group_size: int | None = None) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), file, row_group_size=row_group_size)
    return file


def write_fastvideo(directory: Path, items: Sequence[LatentItem], *, files: int = 2) -> Path:
    """Several files, as the workers of FastVideo write them, with one row group each."""
    for number in range(files):
        rows = [fastvideo_row(item) for item in items[number::files]]
        write_parquet(directory / "combined_parquet_dataset" / f"worker_{number}" / "data_chunk_0.parquet", rows)
    return directory


def write_musubi(directory: Path, items: Sequence[LatentItem], *, clips: bool = True) -> Path:
    """Clips of videos, or images."""
    directory.mkdir(parents=True, exist_ok=True)
    for item in items:
        _, frames, height, width = item.latent.shape
        part = f"_00000-{4 * frames - 3:03d}" if clips else ""
        common = {"architecture": "wan", "format_version": "1.0.1"}
        save_file(
            {f"latents_{frames}x{height}x{width}_float32": item.latent},
            directory / f"{item.name}{part}_0048x0032_wan.safetensors",
            metadata={**common, "width": "48", "height": "32", "frame_count": str(4 * frames - 3)},
        )
        save_file(
            {"varlen_t5_float32": item.text},
            directory / f"{item.name}_wan_te.safetensors",
            metadata={**common, "caption1": item.caption},
        )
    return directory


def write_finetrainers(directory: Path, items: Sequence[LatentItem], *, padded_to: int = 12) -> Path:
    """Mean and log variance, the reciprocal of the std, zeros after each text."""
    directory.mkdir(parents=True, exist_ok=True)
    mean, std = torch.tensor(WAN_2_1.mean), torch.tensor(WAN_2_1.std)
    for number, item in enumerate(items):
        latent = WAN_2_1.denormalize(item.latent)
        moments = torch.cat([latent, torch.full_like(latent, -3.0)])[None]
        torch.save(
            {"latents": moments, "latents_mean": mean, "latents_std": 1 / std}, directory / f"latent-0-{number}.pt"
        )
        text = torch.zeros(1, padded_to, item.text.shape[1])
        text[0, : len(item.text)] = item.text
        torch.save({"encoder_hidden_states": text}, directory / f"condition-0-{number}.pt")
    return directory
