"""Recipe: LoRAs of other people on a converted model: diffusers' verbs and peft's. Ours is left as it was."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import salad_compile
from salad_compile.sites.branch import branches
from tests.support import relative_error
from tests.trainers.tiny import STYLE, base, batch, branch_gradients, converted, flow_matching_loss, output, pipeline
from tests.trainers.tiny import write_style as written

SAME = 1e-5  # of fp32, where the sum is taken in another order: W + BA in place of Wx + BAx


def ours(model: Any) -> dict[str, Tensor]:
    state = model.state_dict().items()  # an adapter may be called "salad"
    return {name: tensor.clone() for name, tensor in state if ".attn1.salad." in name}


def assert_untouched(model: Any, before: dict[str, Tensor]) -> None:
    now = ours(model)
    assert now.keys() == before.keys()
    assert all(torch.equal(now[name], before[name]) for name in before)


def test_diffusers_loras_come_and_go(tmp_path: Path) -> None:
    pipe = pipeline(converted())
    # their update of a query meets it before its position does, and is no part of the position
    assert all(branch.maps_before_position for branch in branches(pipe.transformer).values())
    alone, before, keys = output(pipe.transformer), ours(pipe.transformer), pipe.transformer.state_dict().keys()
    first, second = written(tmp_path / "first", 1), written(tmp_path / "second", 2)

    pipe.load_lora_weights(first, adapter_name="first")
    styled = output(pipe.transformer)
    pipe.load_lora_weights(second, adapter_name="second")
    pipe.set_adapters(["first", "second"], [1.0, 0.0])
    assert relative_error(output(pipe.transformer), styled) < SAME
    pipe.set_adapters(["first", "second"], [0.0, 0.0])
    assert relative_error(output(pipe.transformer), alone) < SAME
    pipe.set_adapters("second")
    assert relative_error(output(pipe.transformer), styled) > 1e-2
    salad_compile.save(pipe.transformer, tmp_path / "salad.safetensors")  # holds nothing of theirs

    pipe.set_adapters("first")
    pipe.fuse_lora(adapter_names=["first"])
    assert relative_error(output(pipe.transformer), styled) < SAME
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert relative_error(output(pipe.transformer), alone) < SAME
    assert relative_error(styled, alone) > 1e-2  # or else all of this says nothing

    assert_untouched(pipe.transformer, before)
    assert pipe.transformer.state_dict().keys() == keys
    saved = load_file(tmp_path / "salad.safetensors")
    assert saved.keys() == before.keys()
    assert all(torch.equal(saved[name], before[name]) for name in before)


def test_peft_adapter_beside_ours_is_trained_and_ours_too(caplog: pytest.LogCaptureFixture) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    model = converted().train()
    before = ours(model)
    inject_adapter_in_model(LoraConfig(**STYLE), model, adapter_name="style")
    assert_untouched(model, before)
    # peft has frozen every parameter that is not its own
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".salad." in name)
    with caplog.at_level(logging.WARNING, "salad_compile"):
        flow_matching_loss(model, **batch()).backward()
    assert "set_trainable" in caplog.text

    caplog.clear()
    salad_compile.set_trainable(model)
    with caplog.at_level(logging.WARNING, "salad_compile"):
        flow_matching_loss(model, **batch()).backward()
    assert not caplog.text
    assert all(gradient.norm() > 0 for gradient in branch_gradients(model).values())
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_A" in name or "lora_B" in name)


@pytest.mark.parametrize("targets", ["all-linear", ["to_q", "query", "q"]])
def test_peft_s_wildcards_find_nothing_of_ours(targets: Any) -> None:
    from peft import LoraConfig

    model = converted()
    before = ours(model)
    model.add_adapter(LoraConfig(r=2, target_modules=targets), adapter_name="style")
    assert_untouched(model, before)


def test_salad_file_loads_into_a_model_that_has_an_adapter(tmp_path: Path) -> None:
    file = salad_compile.save(converted(), tmp_path / "salad.safetensors")
    styled = pipeline(converted())
    styled.load_lora_weights(written(tmp_path / "style", 1))
    other = pipeline(salad_compile.load(base(), file))
    other.load_lora_weights(tmp_path / "style")
    salad_compile.load(other.transformer, file)
    assert torch.equal(output(other.transformer), output(styled.transformer))
