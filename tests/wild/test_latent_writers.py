"""Precomputed data as the real code of other projects' packages writes them."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from salad_compile.latents import WAN_2_1, open_latents
from tests.salad_compile.latents.encoding import world
from tests.support import seeded
from tests.wild import stand_ins
from tests.wild.stand_ins import open_site

open_site()
CAPTION = "a cat walks on the grass"
# what the packages' loaders of videos need, and nothing that is called here
UNUSED = frozenset({"datasets", "torchdata"})

BARE = ("finetrainers", *(f"finetrainers.{name}" for name in ("data", "models", "models.wan", "parallel", "patches")))


def _nothing(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return stand_ins.Nothing


@pytest.fixture(autouse=True)
def _more_stand_ins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For these tests alone: models of other tests are imported without them."""
    before = set(sys.modules)
    monkeypatch.setattr(stand_ins, "ABSENT", stand_ins.ABSENT | UNUSED)
    for name in BARE:  # past what their __init__ imports: parallelism, trainers, a module that the wheel lacks
        package = types.ModuleType(name)
        package.__path__ = [str(stand_ins.SITE / name.replace(".", "/"))]
        package.__getattr__ = _nothing  # type: ignore[method-assign]
        monkeypatch.setitem(sys.modules, name, package)
    yield
    ours = (*UNUSED, *stand_ins.ABSENT, "finetrainers", "fastvideo")
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ours:
            del sys.modules[name]


def test_what_finetrainers_writes_of_wan(tmp_path: Path) -> None:
    """Its own processors and its own writer, around a tiny VAE and text encoder of the real classes."""
    precomputation = pytest.importorskip("finetrainers.data.precomputation")
    processors = pytest.importorskip("finetrainers.processors")
    wan = pytest.importorskip("finetrainers.models.wan.base_specification")
    with seeded(0):
        vae, text_encoder = world.wan_vae(), world.t5("UMT5")
        videos = [torch.rand(1, 9, 3, 32, 48) * 2 - 1 for _ in range(3)]
    latents = wan.WanLatentEncodeProcessor(["latents", "latents_mean", "latents_std"])
    texts = processors.T5Processor(["encoder_hidden_states", "prompt_attention_mask"])

    def encode(**given: Any) -> dict[str, Any]:
        return dict(latents(**given, compute_posterior=False))

    def condition(**given: Any) -> dict[str, Any]:
        return dict(texts(**given))

    writer = precomputation.initialize_preprocessor(
        rank=0,
        num_items=3,
        processor_fn={"latent": encode, "condition": condition},
        save_dir=str(tmp_path),
        enable_precomputation=True,
    )
    clips = [{"video": video, "caption": CAPTION, "max_sequence_length": 12} for video in videos]
    parts = {"latent": {"vae": vae}, "condition": {"tokenizer": world.tokenizer(), "text_encoder": text_encoder}}
    with torch.no_grad():
        for kind, components in parts.items():
            list(writer.consume(kind, components=components, data_iterator=iter(clips), cache_samples=False))
    data = open_latents(tmp_path, sample=0, vae=WAN_2_1)
    assert (data.layout, len(data), data.problems) == ("finetrainers", 3, [])
    expected = world.mode_of(vae, videos[1].permute(0, 2, 1, 3, 4))[0]
    torch.testing.assert_close(data[1].latent, WAN_2_1.normalize(expected), rtol=1e-4, atol=1e-4)
    assert data[1].text.shape == (12, world.TEXT_WIDTH)


def test_the_schemas_of_fastvideo(tmp_path: Path) -> None:
    """Its own column names, for text to video and image to video."""
    import pyarrow
    import pyarrow.parquet

    from tests.salad_compile.latents.data import fastvideo_row, make_items, stored_tensor

    schema = pytest.importorskip("fastvideo.dataset.dataloader.schema")
    items = make_items(2)
    frame, feature = torch.randn(16, 2, 4, 6), torch.randn(5, 3)
    for name, more in {
        "pyarrow_schema_t2v": {},
        "pyarrow_schema_i2v": {
            **stored_tensor("first_frame_latent", frame),
            **stored_tensor("clip_feature", feature),
            **stored_tensor("pil_image", feature),
        },
    }.items():
        rows = [{**fastvideo_row(item), **more} for item in items]
        assert set(rows[0]) == set(getattr(schema, name).names)
        (tmp_path / name).mkdir()
        table = pyarrow.Table.from_pylist(rows, schema=getattr(schema, name))
        pyarrow.parquet.write_table(table, tmp_path / name / "data_chunk_0.parquet")
        found = open_latents(tmp_path / name)[1]
        torch.testing.assert_close(found.latent, items[1].latent)
        assert sorted(found.extras) == (["clip_feature", "first_frame_latent"] if more else [])
