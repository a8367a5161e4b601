"""Recipe: LoRAs of other people, whatever they are called, beside our parameters; checkpoints with former names."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support import relative_error
from tests.trainers.test_adapters import assert_untouched, ours
from tests.trainers.tiny import base, converted, output, pipeline, write_style

LOW_RANK = 2 * (4 * 2 + 1)  # two sites, a pair for each of four projections, a scale


@pytest.mark.parametrize("name", ["lora", "low", "default", "salad", "query", "down", "low_rank", "style", "gate"])
def test_a_hot_swap_leaves_our_parameters(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = write_style(tmp_path / "1", 1), write_style(tmp_path / "2", 2)
    pipe = pipeline(converted())
    pipe.enable_lora_hotswap(target_rank=4)
    before = ours(pipe.transformer)
    with caplog.at_level(logging.WARNING):
        pipe.load_lora_weights(first, adapter_name=name)
        pipe.load_lora_weights(second, adapter_name=name, hotswap=True)
    assert "missing keys" not in caplog.text
    assert_untouched(pipe.transformer, before)
    expected = pipeline(converted())
    expected.load_lora_weights(second, adapter_name="other")
    assert relative_error(output(pipe.transformer), output(expected.transformer)) < 1e-6
    pipe.delete_adapters(name)
    assert_untouched(pipe.transformer, before)
    assert relative_error(output(pipe.transformer), output(converted())) < 1e-6


def test_no_name_has_the_prefix_of_an_adapter() -> None:
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    names = [name.partition(".salad.")[2] for name in ours(converted())]
    prefixes = {str(prefix) for prefix in PEFT_TYPE_TO_PREFIX_MAPPING.values()}
    assert "lora_" in prefixes
    assert not [(name, prefix) for name in names for prefix in prefixes if prefix in name]


def with_former_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As `model.state_dict()` was before format version 5."""
    former = {name.replace(".salad.low_rank_", ".salad.lora_"): value for name, value in state.items()}
    assert len(former.keys() - state.keys()) == LOW_RANK
    return former


def test_a_state_dict_with_former_names_loads() -> None:
    state = converted(3).state_dict()
    model = converted(0)
    before = with_former_names(state)
    keys = list(before)
    assert model.load_state_dict(before) == ([], [])
    assert list(before) == keys, "the caller's dictionary has changed"
    assert torch.equal(output(model), output(converted(3)))
    assert not torch.equal(output(model), output(converted(0)))


def test_a_base_s_own_names_stay() -> None:
    """Only what is below a branch is renamed."""
    model = base()
    model.register_buffer("lora_scale", torch.ones(()))
    assert model.load_state_dict(model.state_dict()) == ([], [])
