"""What becomes of a model's parameters before training: frozen, trainable, and in which dtype."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from salad_compile.errors import ConfigError
from salad_compile.latents import LatentDataset, LatentItem, open_latents, write_latents
from salad_compile.salad_files.salad_file import branch_state
from salad_compile.sites.branch import branches
from salad_compile.training import estimate, train
from salad_compile.training.families import family_of
from salad_compile.training.preparation import make_trainable, require_alike, require_converted
from salad_compile.training.tensors import trained_parameters
from tests.salad_compile.training.tiny import CONFIG, SETTINGS, SHAPE, base, converted, items, latents, wan_forward
from tests.support import randomise_branches


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"settings": {"steps": 2}}, "settings are a TrainSettings.*got a dict"),
        ({"latents": "data"}, "latents are what open_latents.* returns, got a str"),
        ({"latents": None}, "latents are what"),
        ({"validation": "data"}, "validation are what"),
        ({"forward": 5}, "forward is a function"),
        ({"directory": None}, "a path is text"),
        ({"directory": ""}, "a path is empty"),
        ({"directory": __file__}, "is a file: name a directory"),
    ],
)
@pytest.mark.parametrize("function", [train, estimate])
def test_arguments_of_another_kind(function: Any, change: dict[str, Any], said: str, tmp_path: Path) -> None:
    data = latents(tmp_path / "data")
    given = {"latents": data, "settings": SETTINGS, "directory": tmp_path / "run"} | change
    with pytest.raises(ConfigError, match=said):
        function(converted(), **given)
    assert not (tmp_path / "run").exists()


def odd(root: Path, **changes: Any) -> LatentDataset:
    """Items that differ from those of `latents` in one thing."""
    given = {"shape": SHAPE, "length": 5, "width": 16} | changes
    draw = torch.Generator().manual_seed(1)
    text = torch.randn(given["length"], given["width"], generator=draw)
    write_latents([LatentItem(f"odd{i}", torch.randn(given["shape"], generator=draw), text) for i in range(4)], root)
    return open_latents(root, sample=0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"shape": (16, 3, 8, 8)}, "the latents have 16 channels, and WanTransformer3DModel takes 4"),
        ({"shape": (4, 3, 7, 8)}, "the latent of 'odd0' is 7 x 8, .* patches of 2 x 2, which do not divide it"),
        ({"width": 8}, "the text of 'odd0' is 8 wide, and WanTransformer3DModel takes texts of 16"),
        ({"length": 9}, "the text of 'odd0' has 9 tokens, and at most 8 are taken: set text_tokens"),
    ],
)
@pytest.mark.parametrize("function", [train, estimate])
def test_data_of_another_model_are_told_before_anything_is_trained(
    function: Any, changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    good, bad = latents(tmp_path / "data"), odd(tmp_path / "odd", **changes)
    model = base(num_layers=1)
    with pytest.raises(ConfigError, match=said):
        function(model, bad, SETTINGS, tmp_path / "run", config=CONFIG)
    assert not branches(model)
    with pytest.raises(ConfigError, match=f"the validation data do not fit: {said}"):
        function(converted(), good, SETTINGS, tmp_path / "run", validation=bad)
    assert not (tmp_path / "run").exists()


def test_validation_with_what_is_trained_on_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = latents(tmp_path / "data")
    family = family_of(converted(), SETTINGS)
    require_alike(latents(tmp_path / "others", seed=5), data, family)  # other clips of the same names
    assert not caplog.text
    require_alike(data, data, family)
    assert "the validation data hold 9 items of the training data, clip0 first" in caplog.text


def test_a_forward_of_ones_own_takes_validation_as_it_takes_the_data(tmp_path: Path) -> None:
    good, other = latents(tmp_path / "data"), odd(tmp_path / "odd", width=8)
    with pytest.raises(ConfigError, match=r"'odd0' has 8 numbers in each token of a text, and .* 16"):
        train(converted(), good, SETTINGS, tmp_path / "run", validation=other, forward=wan_forward)


def test_branches_are_fp32_and_trainable_and_the_base_is_neither() -> None:
    model = converted().to(torch.bfloat16)
    make_trainable(model, "bf16")
    trained = trained_parameters(model)
    assert len(trained) == sum(len(list(branch.parameters())) for branch in branches(model).values()) > 0
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name in trained), name
        assert parameter.dtype == torch.float32 or name not in trained, name


def test_the_base_is_cast_as_from_pretrained_would(tmp_path: object) -> None:
    """Fails when diffusers renames `_keep_in_fp32_modules`, which is private to it."""
    model = base(num_layers=1)
    model.save_pretrained(tmp_path)
    expected = {
        name: p.dtype
        for name, p in type(model).from_pretrained(tmp_path, torch_dtype=torch.bfloat16).named_parameters()
    }
    assert set(expected.values()) == {torch.bfloat16, torch.float32}
    given = converted()
    make_trainable(given, "bf16")
    trained = trained_parameters(given)
    assert {name: p.dtype for name, p in given.named_parameters() if name not in trained} == expected
    make_trainable(given, "fp32")
    assert {p.dtype for p in given.parameters()} == {torch.float32}


def test_a_bf16_base_trains_fp32_branches() -> None:
    model = converted()
    randomise_branches(model)
    make_trainable(model, "bf16")
    out = model(
        torch.randn(1, 4, 3, 8, 8).bfloat16(),
        torch.tensor([500.0]),
        torch.randn(1, 8, 16).bfloat16(),
        return_dict=False,
    )[0]
    assert out.dtype == torch.bfloat16
    out.float().square().mean().backward()
    for name, parameter in trained_parameters(model).items():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.norm() > 0, name


def test_branches_that_another_library_froze_are_trained_and_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = converted()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with caplog.at_level(logging.WARNING, "salad_compile"):
        make_trainable(model, "fp32")
    assert "load_lora_weights" in caplog.text
    assert all(parameter.requires_grad for parameter in trained_parameters(model).values())


def test_what_else_was_trainable_is_frozen_and_named(caplog: pytest.LogCaptureFixture) -> None:
    model = converted()
    model.proj_out.weight.requires_grad_(True)
    with caplog.at_level(logging.WARNING, "salad_compile"):
        make_trainable(model, "fp32")
    assert "proj_out.weight" in caplog.text
    assert not model.proj_out.weight.requires_grad


def test_conversion_takes_its_example_from_the_largest_latent() -> None:
    class Two:
        names = ("small", "large")
        shapes = ((4, 1, 2, 2), (4, 3, 8, 8))

        def __getitem__(self, index: int) -> object:
            assert index == 1
            return next(iter(items(1)))

    model = base(num_layers=1)
    wan = family_of(model, SETTINGS)
    state = torch.random.get_rng_state()
    require_converted(model, Two(), SETTINGS, CONFIG, wan)  # type: ignore[arg-type]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert list(branches(model)) == ["blocks.0.attn1.salad"]
    again = base(num_layers=1)
    require_converted(again, Two(), SETTINGS, CONFIG, wan)  # type: ignore[arg-type]
    ours, theirs = (branch_state(each) for each in (model, again))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_base_as_from_pretrained_leaves_it_is_converted(tmp_path: Path) -> None:
    """Its first parameter is fp32, and most are bf16: the example has to be in what convolutions are in."""
    base(num_layers=1).save_pretrained(tmp_path / "model")
    model = type(base(num_layers=1)).from_pretrained(tmp_path / "model", torch_dtype=torch.bfloat16)
    assert next(model.parameters()).dtype == torch.float32
    require_converted(model, latents(tmp_path / "latents", 2), SETTINGS, CONFIG, family_of(model, SETTINGS))
    assert len(branches(model)) == 1
