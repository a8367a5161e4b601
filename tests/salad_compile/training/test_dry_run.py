"""estimate(): what a run would take, from three steps that leave nothing behind."""

from __future__ import annotations

import dataclasses
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from salad_compile.common.locks import hold
from salad_compile.errors import ConfigError, WriteError
from salad_compile.latents import LatentItem, open_latents, write_latents
from salad_compile.sites.branch import branches
from salad_compile.training import Estimate, TrainSettings, estimate, records, rehearsal, train
from salad_compile.training.engine import Engine
from salad_compile.training.flow_matching import Forward
from salad_compile.training.preparation import mean_sparsity
from tests.salad_compile.training.tiny import CONFIG, SETTINGS, base, converted, items, latents, wan_forward

RUN = dataclasses.replace(
    SETTINGS, steps=40, checkpoint_every=10, validation_every=10, validation_points=2, keep_last=2
)


def test_it_predicts_a_run_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # other programs share the processors: seconds of this process, on both sides
    monkeypatch.setattr(rehearsal, "clock", lambda device: time.process_time())
    monkeypatch.setattr(records, "time", SimpleNamespace(perf_counter=time.process_time))
    data, held_out = latents(tmp_path / "latents"), latents(tmp_path / "held-out", 2, prefix="held", seed=9)
    model = converted()
    before = {name: parameter.clone() for name, parameter in model.named_parameters() if ".salad." in name}
    present = sorted(tmp_path.rglob("*"))
    found = estimate(model, data, RUN, tmp_path / "run", validation=held_out)
    assert sorted(tmp_path.rglob("*")) == present
    assert all(torch.equal(model.get_parameter(name), parameter) for name, parameter in before.items())
    result = train(converted(), data, RUN, tmp_path / "run", validation=held_out)
    assert found.seconds == pytest.approx(result.outcome.seconds, rel=0.3)
    written = sum(path.stat().st_size for path in (tmp_path / "run").rglob("*.safetensors"))
    one = sum(path.stat().st_size for path in (tmp_path / "run" / "checkpoints" / "step-00000040").rglob("*.safetens*"))
    assert found.disk == written + one  # one more while it is written
    assert 2**20 < found.peak_memory < found.memory


def seconds_by_size(monkeypatch: pytest.MonkeyPatch, asked: list[torch.Size]) -> Forward:
    """A clock that only the forward moves, by a second for each element of a sample."""
    now = [0.0]

    def forward(model: torch.nn.Module, noisy: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        now[0] += noisy[0].numel() * len(noisy)
        asked.append(noisy.shape[1:])
        return wan_forward(model, noisy, *rest)

    monkeypatch.setattr(rehearsal, "clock", lambda device: now[0])
    return forward


def test_sizes_count_as_often_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of the items has half of the elements, as many have one and a half times as many, and twice as many."""
    shapes = [(4, 3, 8, 8), (4, 3, 8, 16), (4, 3, 8, 12), (4, 3, 4, 8)]
    text = next(iter(items(1))).text
    for number, shape in enumerate(shapes):
        named = (LatentItem(f"{number}-{place}", torch.randn(shape), text) for place in range(4))
        write_latents(named, tmp_path / str(number))
    write_latents((item for n in range(4) for item in open_latents(tmp_path / str(n))), tmp_path / "all")
    asked: list[torch.Size] = []
    forward = seconds_by_size(monkeypatch, asked)
    found = estimate(converted(), open_latents(tmp_path / "all"), RUN, tmp_path / "run", forward=forward)
    assert found.step_seconds == pytest.approx(4 * 4 * 3 * 8 * (4 + 8 + 12 + 16) / 4, rel=0.02)
    assert asked[0] == torch.Size((4, 3, 8, 16))
    assert len(set(asked)) == 3


def test_both_stages_of_a_distilled_run_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "MOST_STEPS", rehearsal.MEASURED_STEPS)
    data = latents(tmp_path / "latents")
    seen: list[torch.Size] = []

    def forward(model: torch.nn.Module, *arguments: torch.Tensor) -> torch.Tensor:
        seen.append(arguments[0].shape)
        return wan_forward(model, *arguments)

    found = estimate(
        converted(), data, dataclasses.replace(RUN, distillation_steps=5), tmp_path / "run", forward=forward
    )
    assert len(seen) == 2 * 3 * 2  # stages, steps, micro-batches
    assert found.validation_seconds == 0


def test_compilation_is_timed_as_the_run_will_find_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock on which forwards take a second, and ten more where something was forgotten before."""
    data, held_out = latents(tmp_path / "latents"), latents(tmp_path / "held-out", 2, prefix="held", seed=9)
    now, fresh, resets = [0.0], [True], []

    def forward(model: torch.nn.Module, noisy: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        now[0] += 11.0 if fresh[0] else 1.0
        fresh[0] = False
        return wan_forward(model, noisy, *rest)

    def reset() -> None:
        resets.append(now[0])
        fresh[0] = True

    monkeypatch.setattr(rehearsal, "clock", lambda device: now[0])
    monkeypatch.setattr(torch.compiler, "reset", reset)
    monkeypatch.setattr(Engine, "compile", lambda self: None)
    assert rehearsal._import_compiler() >= 0
    monkeypatch.setattr(rehearsal, "_import_compiler", lambda: 3.0)
    settings = dataclasses.replace(RUN, compile="model", validation_every=20)
    found = estimate(converted(), data, settings, tmp_path / "run", validation=held_out, forward=forward)
    assert found.step_seconds == 2.0  # two micro-batches
    assert found.compile_seconds == 10.0 + 3.0
    assert found.validation_seconds == 2 * 2 * 5  # items, noise levels; three at first and two later
    assert len(resets) == 1


def test_steps_while_the_sparsity_grows_are_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock on which a step takes as long as its density: 0.8 at first, 0.3 in the end."""
    now, model = [0.0], converted()

    def forward(wan: torch.nn.Module, *arguments: torch.Tensor) -> torch.Tensor:
        now[0] += (1 - mean_sparsity(branches(model))) / 2  # two micro-batches
        return wan_forward(wan, *arguments)

    monkeypatch.setattr(rehearsal, "clock", lambda device: now[0])
    data = latents(tmp_path / "latents")
    settings = dataclasses.replace(RUN, steps=40, sparsity_warmup=10)
    found = estimate(model, data, settings, tmp_path / "run", forward=forward)
    assert found.step_seconds == pytest.approx((10 * (0.8 + 0.3) / 2 + 30 * 0.3) / 40)
    assert mean_sparsity(branches(model)) == pytest.approx(0.7)


def test_what_a_killed_one_left_is_removed_and_what_a_living_one_has_is_not(tmp_path: Path) -> None:
    left, living = tmp_path / ".salad-dry-run-left", tmp_path / ".salad-dry-run-living"
    for folder in (left, living):
        (folder / "checkpoints").mkdir(parents=True)
    with hold(living):
        estimate(converted(), latents(tmp_path / "latents"), RUN, tmp_path / "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == [living.name, "latents"]


def test_a_failure_leaves_the_branches_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = converted(), latents(tmp_path / "latents")
    before = {name: parameter.clone() for name, parameter in model.named_parameters() if ".salad." in name}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 5000))  # type: ignore[attr-defined]
    with pytest.raises(WriteError, match=f"{tmp_path} has room for 0 MiB"):
        estimate(model, data, RUN, tmp_path / "run")
    assert all(torch.equal(model.get_parameter(name), parameter) for name, parameter in before.items())
    assert [path.name for path in tmp_path.iterdir()] == ["latents"]


def test_a_run_that_began_otherwise_is_told_as_it_will_go_on(tmp_path: Path) -> None:
    given = {name: value for name, value in CONFIG.to_dict().items() if not name.startswith("compensation")}
    data, model = latents(tmp_path / "latents"), base(num_layers=1)
    train(base(num_layers=1), data, dataclasses.replace(RUN, steps=1), tmp_path / "run", config=CONFIG)
    estimate(model, data, RUN, tmp_path / "run", config=given)
    assert CONFIG.compensation == next(iter(branches(model).values())).config.compensation == "none"


def test_mistakes_are_those_of_train(tmp_path: Path) -> None:
    data = latents(tmp_path / "latents")
    with pytest.raises(ConfigError, match="must be a multiple"):
        estimate(base(num_layers=1), data, TrainSettings(batch=9, micro_batch=2), tmp_path / "run", config=CONFIG)
    assert not (tmp_path / "run").exists()


def test_the_sentence_says_when_the_disk_is_too_small() -> None:
    found = Estimate(1600, 8, 7.2, 60.0, 240.0, 0.0, 0.0, 61 * 2**30, 80 * 2**30, 5 * 2**30, 100 * 2**30)
    assert found.sentence().splitlines() == [
        "1,600 steps of 8 samples take 3 h 17 min: 7.2 s a step, 1 min to compile, 4 min of validation",
        "peak memory 61.0 GiB of 80.0 GiB",
        "5.0 GiB on the disk, where 100.0 GiB are free",
    ]
    assert dataclasses.replace(found, free=2**30).sentence().endswith("where 1.0 GiB are free: too little")
