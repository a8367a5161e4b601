"""The order of batches: a pure function of the step; and items as tensors."""

from __future__ import annotations

import logging
import pickle
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from salad_compile.errors import ConfigError, LatentItemError
from salad_compile.latents import LatentItem, ShapeBatches, collate, open_latents, write_latents
from salad_compile.latents.batching import WAN_TEXT_LENGTH
from tests.salad_compile.latents.data import make_item

A, B, C = (16, 2, 4, 6), (16, 1, 4, 4), (16, 5, 2, 2)
PINNED = [[4, 1], [6, 5], [8, 7], [3, 0], [2, 1]]
SHAPES = [A] * 11 + [B] * 8 + [A] * 2 + [C] * 5  # 13, 8 and 5


def test_every_batch_has_one_shape_and_no_item_comes_twice_in_an_epoch() -> None:
    batches = ShapeBatches(SHAPES, 4, seed=1)
    assert batches.steps_per_epoch == 3 + 2 + 1
    for epoch in range(5):
        steps = [batches.at(epoch * 6 + place) for place in range(6)]
        assert all(len({SHAPES[index] for index in step}) == 1 and len(step) == 4 for step in steps)
        seen = [index for step in steps for index in step]
        assert len(set(seen)) == len(seen) == 24
        assert set(range(11, 19)) <= set(seen)  # 8 items of B: nothing left over


def test_what_is_left_over_changes_from_epoch_to_epoch() -> None:
    batches = ShapeBatches(SHAPES, 4, seed=1)
    left = [
        set(range(26)) - {index for place in range(6) for index in batches.at(epoch * 6 + place)} for epoch in range(12)
    ]
    assert all(len(missing) == 2 for missing in left)
    assert set.intersection(*left) == set()
    assert len({frozenset(missing) for missing in left}) > 3


def test_step_and_seed_say_it_all() -> None:
    order = list(islice(ShapeBatches(SHAPES, 3, seed=7).from_step(0), 40))
    assert list(islice(ShapeBatches(SHAPES, 3, seed=7).from_step(17), 23)) == order[17:]
    backwards = ShapeBatches(SHAPES, 3, seed=7)
    assert [backwards.at(step) for step in reversed(range(40))] == order[::-1]
    assert list(islice(pickle.loads(pickle.dumps(backwards)).from_step(0), 40)) == order
    assert list(islice(ShapeBatches(SHAPES, 3, seed=8).from_step(0), 40)) != order
    epochs = ShapeBatches(SHAPES, 3, seed=7)
    number = epochs.steps_per_epoch
    assert order[:number] != order[number : 2 * number]


def test_the_order_is_the_same_in_every_release() -> None:
    # written down once: a checkpoint of an older release has to go on with the same data
    assert [ShapeBatches([A] * 5 + [B] * 4, 2, seed=3).at(step) for step in range(5)] == PINNED


def test_ranks_share_out_the_batch_of_one_process() -> None:
    whole = ShapeBatches(SHAPES, 4, seed=5)
    ranks = [ShapeBatches(SHAPES, 2, seed=5, world_size=2, rank=rank) for rank in range(2)]
    for step in range(20):
        parts = [rank.at(step) for rank in ranks]
        assert all(len(part) == 2 for part in parts)
        assert sorted(parts[0] + parts[1]) == sorted(whole.at(step))


def test_batches_that_cannot_be(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "salad_compile"):
        batches = ShapeBatches(SHAPES, 3, world_size=2)
    assert "fewer items than a batch of 6 are never used: {(16, 5, 2, 2): 5}" in caplog.text
    assert batches.steps_per_epoch == 3
    with pytest.raises(ConfigError, match=r"14 items of one shape are needed .*13"):
        ShapeBatches(SHAPES, 14)
    for wrong in ({"batch_size": 0}, {"batch_size": 1, "world_size": 0}, {"batch_size": 1, "rank": 1}):
        with pytest.raises(ConfigError, match="rank is below world_size"):
            ShapeBatches(SHAPES, **wrong)


def test_collate_pads_with_zeros() -> None:
    items = [make_item(0, length=3), make_item(1, length=5)]
    batch = collate(items)
    assert torch.equal(batch.latents, torch.stack([item.latent for item in items]))
    assert batch.text.shape == (2, 5, 8)
    assert batch.text_lengths.tolist() == [3, 5]
    assert torch.equal(batch.text[0, :3], items[0].text)
    assert not batch.text[0, 3:].any()
    assert torch.equal(batch.text[1], items[1].text)
    assert (batch.names, batch.captions) == (("clip0", "clip1"), tuple(item.caption for item in items))
    assert batch.fps == (16.0, 16.0)
    wan = collate(items, text_length=WAN_TEXT_LENGTH).text
    assert wan.shape == (2, 512, 8)
    assert torch.equal(wan[:, :5], batch.text)
    assert not wan[:, 5:].any()


def test_collate_and_dtypes() -> None:
    half = replace(make_item(0), text=make_item(0).text.bfloat16())
    assert collate([half, half]).text.dtype == torch.bfloat16
    mixed = collate([half, make_item(1)]).text
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed[1, : len(make_item(1).text)], make_item(1).text)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (make_item(1, (16, 1, 4, 6)), "clip1 has a latent of .*clip0, in the same batch"),
        (make_item(1, width=9), "text of width 9"),
        (make_item(1, length=7), "clip1 has a text of 7 tokens, text_length is 6"),
    ],
)
def test_items_that_make_no_batch(other: LatentItem, message: str) -> None:
    with pytest.raises(LatentItemError, match=message):
        collate([make_item(0), other], text_length=6)


def test_a_dataloader_takes_it_up_at_any_step(tmp_path: Path) -> None:
    items = [make_item(number, A if number % 3 else B) for number in range(12)]
    latents = open_latents(write_latents(items, tmp_path), sample=0)
    batches = ShapeBatches(latents.shapes, 2, seed=2)
    loader = DataLoader(latents, batch_sampler=batches.from_step(5), collate_fn=collate)  # type: ignore[arg-type]
    for step, batch in zip(range(5, 9), loader, strict=False):
        assert batch.names == tuple(latents.names[index] for index in batches.at(step))
