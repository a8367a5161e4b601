"""What a run tells of its success: first losses, the share of the gap that was closed, and the sentence."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import salad_compile
from salad_compile.sites.branch import branches
from salad_compile.training import Outcome, read_log, train
from salad_compile.training.flow_matching import losses, validation_sample
from salad_compile.training.outcome import outcome_of
from salad_compile.training.reference_states import as_base, as_untrained
from tests.models.zoo import randomise
from tests.salad_compile.training.tiny import CONFIG, SETTINGS, SHAPE, base, converted, latents, wan_forward

RUN = dataclasses.replace(SETTINGS, steps=3, validation_points=2, checkpoint_every=1)


def measured(model: Any, data: Any) -> float:
    """The validation loss, by hand."""
    found = []
    with torch.no_grad():
        for index in range(len(data)):
            for point in range(RUN.validation_points):
                batch = validation_sample(data[index], RUN, index, point)
                found.append(losses(wan_forward(model, batch.latents, batch.timesteps, batch.texts), batch.target))
    return float(torch.cat(found).double().mean())


def trained() -> Any:
    """A converted model whose branches are not at their start."""
    model = converted()
    for branch in branches(model).values():
        randomise(branch, 5)
    return model


def test_first_losses_are_those_of_the_base_and_of_a_fresh_conversion(tmp_path: Path) -> None:
    data, held_out = latents(tmp_path / "latents"), latents(tmp_path / "held-out", 2, prefix="held", seed=9)
    model = trained()
    now = measured(model, held_out)
    result = train(model, data, RUN, tmp_path / "run", validation=held_out)
    line = read_log(tmp_path / "run")[0]
    assert line["step"] == 0
    assert line["dense_validation_loss"] == pytest.approx(measured(base(num_layers=1), held_out), rel=1e-5)
    assert line["untrained_validation_loss"] == pytest.approx(measured(converted(), held_out), rel=1e-5)
    assert line["validation_loss"] == pytest.approx(now, rel=1e-5)
    assert len({line["dense_validation_loss"], line["untrained_validation_loss"], line["validation_loss"]}) == 3
    outcome = result.outcome
    assert outcome.now == pytest.approx(measured(model, held_out), rel=1e-5)
    assert (outcome.untrained, outcome.dense) == (line["untrained_validation_loss"], line["dense_validation_loss"])
    assert json.loads((tmp_path / "run" / "training.json").read_text())["outcome"] == outcome.to_dict()
    salad_compile.export(
        model, tmp_path / "out", ["salad"], training=json.loads((tmp_path / "run" / "training.json").read_text())
    )
    sentence = outcome.sentence()
    assert f"## Training\n\nV{sentence[1:]}.\n\n- steps: 3" in (tmp_path / "out" / "README.md").read_text()


def test_what_comes_before_the_first_step_and_between_steps_shows_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("salad_compile.common.progress.LINE_SECONDS", 0)
    held_out = latents(tmp_path / "held-out", 2, prefix="held", seed=9)
    settings = dataclasses.replace(RUN, steps=1, validation_every=1)
    train(converted(), latents(tmp_path / "latents"), settings, tmp_path / "run", validation=held_out)
    said = capsys.readouterr().err.splitlines()
    count = 2 * settings.validation_points
    for what in ("validation, dense", "validation, untrained", "validation"):
        assert f"train: 0/1, {what} {count} of {count}" in said
    assert any(line.startswith(f"train: 1/1, validation {count} of {count}") for line in said)


def test_a_continued_run_keeps_its_first_losses_and_adds_its_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data, held_out = latents(tmp_path / "latents"), latents(tmp_path / "held-out", 2, prefix="held", seed=9)
    train(converted(), data, RUN, tmp_path / "run", validation=held_out)
    first = read_log(tmp_path / "run")
    again = train(converted(), data, dataclasses.replace(RUN, steps=4), tmp_path / "run", validation=held_out)
    log = read_log(tmp_path / "run")
    assert log[0] == first[0]
    assert [line["step"] for line in log if "dense_validation_loss" in line] == [0]
    assert [line["step"] for line in log if "result" in line] == [4]
    assert again.outcome.seconds > max(line.get("seconds", 0) for line in first)
    other = latents(tmp_path / "other", 1, prefix="other", seed=5)
    train(converted(), data, dataclasses.replace(RUN, steps=5), tmp_path / "run", validation=other)
    assert "validation data is not what it was" in caplog.text
    assert [line["step"] for line in read_log(tmp_path / "run") if "dense_validation_loss" in line] == [0, 4]


def test_stand_ins_leave_every_parameter_as_it_was() -> None:
    model = trained()
    salad_compile.set_sparsity(model, 0.4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    example = (torch.randn(1, *SHAPE), torch.tensor([500.0]), torch.randn(1, 8, 16))
    fresh = converted()
    with as_untrained(model), torch.no_grad():
        torch.testing.assert_close(model(*example).sample, fresh(*example).sample)
    with as_base(branches(model).values()), torch.no_grad():
        torch.testing.assert_close(model(*example).sample, base(num_layers=1)(*example).sample)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(branch.switch.dense for branch in branches(model).values())


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ((0.139, 0.098, 0.079, 11520), "validation 0.139 untrained, 0.098 now, dense 0.079: 68 % of the gap closed"),
        ((0.139, 0.150, 0.079, 1), "validation 0.139 untrained, 0.15 now, dense 0.079: worse than before training"),
        ((0.139, 0.070, 0.079, 1), "dense 0.079: all of the gap closed, and lower than dense attention"),
        ((0.139, 0.098, 0.139, 1), "sparsity costs less than 0.1 % of the loss here, so there is no gap to close"),
        ((2.3380, 2.3372, 2.3379, 1), "sparsity costs less than 0.1 % of the loss here"),
        ((2.342, 2.340, 2.338, 1), "50 % of the gap closed"),
        ((None, None, None, 1), "no validation data, so nothing says whether it worked; 1 s"),
        ((None, 0.1, None, 700), "validation 0.1; 12 min"),
    ],
)
def test_the_sentence(values: tuple[Any, ...], said: str) -> None:
    assert said in Outcome(*values).sentence()
    assert Outcome(0.139, 0.098, 0.079, 11520.0).sentence().endswith("; 3 h 12 min")


def test_losses_at_a_growing_sparsity_are_not_compared(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data, held_out = latents(tmp_path / "latents"), latents(tmp_path / "held-out", 1, prefix="held", seed=9)
    settings = dataclasses.replace(RUN, sparsity_warmup=2, validation_every=1, steps=2)
    train(trained(), data, settings, tmp_path / "run", validation=held_out)
    log = read_log(tmp_path / "run")
    assert CONFIG.lowest_sparsity is not None
    assert [line["gap_closed"] for line in log if "gap_closed" in line] == [None] * 3  # two validations, and the end
    assert "the run has 2 steps: it ends at a lower sparsity" in caplog.text
    measured = {"step": 0, "untrained_validation_loss": 2.0, "dense_validation_loss": 1.0, "validation_loss": 2.0}
    growing, grown = ({"step": 2, "validation_loss": 1.5, "gap_closed": closed} for closed in (None, 0.5))
    assert outcome_of([measured, growing]).verdict() == "validation 1.5"
    assert outcome_of([measured, growing, grown]).gap_closed == 0.5
