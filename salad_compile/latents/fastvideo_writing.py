"""Writes Parquet files as FastVideo's trainer reads them; the format is described in fastvideo.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from salad_compile.common.files import name_failures, write_at_once
from salad_compile.latents.fastvideo import require_pyarrow
from salad_compile.latents.item import LatentItem
from salad_compile.latents.statistics import LatentStatistics

_PIXELS = 8  # per latent of Wan's VAE, in height and width


class FastVideoWriter:
    """Writes `combined_parquet_dataset/worker_0/data_chunk_<n>.parquet`, each as a whole.

    One row group per item: both readers, FastVideo's and ours, then read one item at a time.
    """

    def __init__(self, directory: Path, statistics: LatentStatistics) -> None:
        """`statistics` of the VAE: FastVideo's latents are not normalised. Raises MissingPackageError."""
        require_pyarrow()
        self._statistics = statistics
        self._folder = directory / "combined_parquet_dataset" / "worker_0"
        with name_failures(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)

    def keep(self, chunk: int) -> bool:
        """Whether an interrupted run wrote this file."""
        return self._file(chunk).exists()

    def write(self, chunk: int, items: list[LatentItem]) -> None:
        """Write one file."""
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.Table.from_pylist([self._row(item) for item in items], schema=_schema())
        with write_at_once(self._file(chunk), held=True) as temporary:
            pyarrow.parquet.write_table(
                table, temporary, compression="zstd", row_group_size=1, write_page_checksum=True
            )

    def _file(self, chunk: int) -> Path:
        return self._folder / f"data_chunk_{chunk:06d}.parquet"

    def _row(self, item: LatentItem) -> dict[str, Any]:
        latent = self._statistics.denormalize(item.latent).contiguous()
        text = item.text.float().contiguous()  # FastVideo reads everything as float32
        return {
            "id": item.name,
            "vae_latent_bytes": latent.numpy().tobytes(),
            "vae_latent_shape": list(latent.shape),
            "vae_latent_dtype": "float32",
            "text_embedding_bytes": text.numpy().tobytes(),
            "text_embedding_shape": list(text.shape),
            "text_embedding_dtype": "float32",
            "file_name": item.name,
            "caption": item.caption,
            "media_type": "video" if latent.shape[1] > 1 else "image",
            "width": latent.shape[3] * _PIXELS,
            "height": latent.shape[2] * _PIXELS,
            "num_frames": latent.shape[1],  # FastVideo counts frames of the latent here
            "duration_sec": 0.0,
            "fps": item.fps or 0.0,
        }


def _schema() -> Any:
    import pyarrow

    text, whole, real, sizes = pyarrow.string(), pyarrow.int64(), pyarrow.float64(), pyarrow.list_(pyarrow.int64())
    fields: list[tuple[str, Any]] = [("id", text)]
    for name in ("vae_latent", "text_embedding"):
        fields += [(f"{name}_bytes", pyarrow.binary()), (f"{name}_shape", sizes), (f"{name}_dtype", text)]
    fields += [("file_name", text), ("caption", text), ("media_type", text), ("width", whole), ("height", whole)]
    fields += [("num_frames", whole), ("duration_sec", real), ("fps", real)]
    return pyarrow.schema([pyarrow.field(*field) for field in fields])
