"""The layer-wise warm-up: what it compares, its gradients, and that it brings the sites nearer to dense attention."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

import salad_compile
from salad_compile.sites.branch import branches
from salad_compile.training import read_log, train
from salad_compile.training.distillation import SiteDistillation
from tests import support
from tests.models.registry import ALL_CASES
from tests.salad_compile.training.tiny import CONFIG, SETTINGS, base, converted, latents
from tests.support import randomise_branches, relative_error

INPUTS = {
    "hidden_states": torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1)),
    "timestep": torch.tensor([300.0, 700.0]),
    "encoder_hidden_states": torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(2)),
}


def two_blocks() -> Any:
    """In the flat order, because a site that is called alone knows no grid."""
    model = salad_compile.convert(base(), dataclasses.replace(CONFIG, token_order="flat"), example_inputs=INPUTS)
    randomise_branches(model)
    return model


def attention_of(model: Any) -> list[tuple[tuple[Any, ...], dict[str, Any], torch.Tensor]]:
    """Arguments and answer of each self-attention in one forward."""
    seen: list[Any] = []
    handles = [
        block.attn1.register_forward_hook(lambda module, *call: seen.append(call), with_kwargs=True)
        for block in model.blocks
    ]
    with torch.no_grad():
        model(**INPUTS)
    for handle in handles:
        handle.remove()
    return seen


def test_each_site_is_held_against_the_base_model_on_the_base_models_activations() -> None:
    model = two_blocks()
    distillation = SiteDistillation(model, scale=0.5)
    with distillation.watching():
        out = model(**INPUTS).sample
    assert torch.equal(out, base()(**INPUTS).sample)  # dense answers went on, without LoRA
    reference = two_blocks()
    expected = []
    size, _ = reference.blocks[0].attn1.salad.grid.read(INPUTS)
    for block, (args, kwargs, dense) in zip(reference.blocks, attention_of(base()), strict=True):
        with salad_compile.token_grid(reference, size):  # its sites run outside of its forward
            out = block.attn1(*args, **kwargs)
        error = (out - dense).square().flatten(1).mean(1) / dense.square().flatten(1).mean(1)
        (0.5 * error.mean() / 2).backward()
        expected.append(error.detach())
    torch.testing.assert_close(distillation.losses(), torch.stack(expected).mean(0))
    gradients = distillation.take_gradients()
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, parameter in reference.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.norm() > 0, name
            assert relative_error(gradients.pop(name), parameter.grad) < 1e-5, name  # fp32
    assert not gradients
    assert not distillation.take_gradients()


def test_updates_outside_of_a_site_are_left_out_of_it() -> None:
    """HunyuanVideo's single blocks project attention and MLP together, behind the module that owns the call."""
    case = ALL_CASES["HunyuanVideo"]
    model = support.converted(case)
    distillation = SiteDistillation(model, 1.0)
    with distillation.watching():
        out = case.output(model(**case.inputs(0)))
    assert not out.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(out, case.output(case.build()(**case.inputs(0))))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    missing = trained - distillation.take_gradients().keys()
    assert {name.rpartition(".")[2] for name in missing} <= {"low_rank_out_down", "low_rank_out_up"}


def test_afterwards_the_model_is_as_it_was() -> None:
    model = two_blocks()
    before = model(**INPUTS).sample
    with SiteDistillation(model, 1.0).watching():
        model(**INPUTS)
    assert torch.equal(model(**INPUTS).sample, before)
    assert not any(block.attn1._forward_hooks for block in model.blocks)
    assert all(float(branch.low_rank_scale) == 1.0 for branch in branches(model).values())


def test_a_run_begins_with_it(tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, steps=18, distillation_steps=16, text_dropout=0.0, learning_rate=3e-2)
    train(converted(), latents(tmp_path / "latents"), settings, tmp_path / "run")
    log = [line for line in read_log(tmp_path / "run") if "loss" in line]
    assert [line["stage"] for line in log] == ["distillation"] * 16 + ["flow matching"] * 2
    losses = [line["loss"] for line in log[:16]]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
