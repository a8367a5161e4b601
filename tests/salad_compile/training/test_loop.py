"""train(): resumed runs are bitwise those without a break, and what goes wrong leaves all as it was."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import salad_compile
from salad_compile.common.locks import hold
from salad_compile.common.progress import quiet
from salad_compile.errors import ConfigError, NotConvertedError, ResumeError, TrainingError, WriteError
from salad_compile.latents import LatentDataset, LatentItem, ShapeBatches, open_latents, write_latents
from salad_compile.salad_files.location import file_at
from salad_compile.sites.branch import branches
from salad_compile.training import TrainSettings, read_log, train
from salad_compile.training import loop as loop_module
from tests.salad_compile.training.tiny import CONFIG, SETTINGS, base, converted, items, latents, wan_forward

RUN = dataclasses.replace(SETTINGS, sparsity_warmup=4, ema_decay=0.8, validation_every=2, validation_points=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    latents(root / "latents")
    latents(root / "held-out", 2, prefix="held", seed=9)
    return root


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without a break."""
    directory = tmp_path_factory.mktemp("runs") / "whole"
    run(data, directory)
    return directory


def run(data: Path, directory: Path, settings: TrainSettings = RUN, model: Any = None, **more: Any) -> Any:
    held_out = open_latents(data / "held-out")
    given = {"validation": held_out} | more
    return train(model or converted(), open_latents(data / "latents"), settings, directory, **given)


def curve(directory: Path) -> list[dict[str, Any]]:
    clocks = ("steps_per_second", "peak_memory", "seconds", "result")
    return [{k: v for k, v in line.items() if k not in clocks} for line in read_log(directory)]


def assert_same(directory: Path, expected: Path) -> None:
    assert curve(directory) == curve(expected)
    for name in ("salad.safetensors", "salad_ema.safetensors"):
        ours, theirs = load_file(directory / name), load_file(expected / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_run_trains_and_leaves_its_files(whole: Path, data: Path) -> None:
    log = read_log(whole)
    assert [line["step"] for line in log] == [0, 1, 2, 2, 3, 4, 4, 5, 6, 6, 6]
    steps = [line for line in log if "loss" in line]
    assert [line["learning_rate"] for line in steps] == pytest.approx([1e-2 / 3, 2e-2 / 3, *[1e-2] * 4])
    assert [line["sparsity"] for line in steps] == pytest.approx([0.2, 0.325, 0.45, 0.575, 0.7, 0.7])
    assert all(line["peak_memory"] > 2**20 and line["steps_per_second"] > 0 for line in steps)
    validated = [line["validation_loss"] for line in log if "validation_loss" in line]
    assert len(set(validated)) == 4
    fresh, trained = converted(), load_file(whole / "salad.safetensors")
    start = {name: p.clone() for name, p in fresh.named_parameters() if ".salad." in name}
    assert all(not torch.equal(trained[name], value) for name, value in start.items())
    summary = json.loads((whole / "training.json").read_text())
    assert (summary["steps"], summary["items"], summary["validation_loss"]) == (6, 9, validated[-1])
    assert TrainSettings.from_dict(summary["settings"]) == RUN
    model = salad_compile.load(base(num_layers=1), whole / "salad.safetensors")
    assert next(iter(branches(model).values())).config == CONFIG


def test_the_base_model_is_the_teacher(data: Path, tmp_path: Path) -> None:
    """Where nothing is left out an untrained model predicts what its base does; the flow it does not."""
    found = {}
    for teacher in (0.0, 0.5, 1.0):
        model = converted()
        salad_compile.set_sparsity(model, 0.2)
        settings = dataclasses.replace(SETTINGS, steps=2, teacher=teacher)
        run(data, tmp_path / str(teacher), settings, model)
        found[teacher] = [line["loss"] for line in read_log(tmp_path / str(teacher)) if "loss" in line]
        assert all(float(branch.low_rank_scale) for branch in branches(model).values())
    assert 0 < found[1.0][0] < 0.1 * found[0.0][0]
    assert found[0.5][0] == pytest.approx(found[0.0][0] / 4, rel=0.2)  # half of the way there
    assert found[1.0][1] != found[1.0][0]


def test_the_moving_average_is_that_of_the_checkpoints(data: Path, tmp_path: Path) -> None:
    settings = dataclasses.replace(RUN, steps=3, checkpoint_every=1, keep_last=9)
    model = converted()
    names = [name for name, _ in model.named_parameters() if ".salad." in name]
    average = {name: model.get_parameter(name).detach().clone() for name in names}
    run(data, tmp_path, settings, model)
    for step in (1, 2, 3):
        at = load_file(tmp_path / "checkpoints" / f"step-{step:08d}" / "salad.safetensors")
        average = {name: 0.8 * value + 0.2 * at[name] for name, value in average.items()}
    found = load_file(tmp_path / "salad_ema.safetensors")
    for name, value in average.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)  # three rounded fp32 steps


@pytest.mark.parametrize("kept", [2, 4, 6])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(data: Path, whole: Path, tmp_path: Path, kept: int) -> None:
    """As if killed between the checkpoint `kept` and the next, with lines of later steps in the log."""
    directory = tmp_path / "run"
    shutil.copytree(whole, directory)
    for step in range(kept + 2, 7, 2):
        shutil.rmtree(directory / "checkpoints" / f"step-{step:08d}")
    for path in directory.glob("*.*"):
        if path.name != "log.jsonl":
            path.unlink()
    with (directory / "log.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    (directory / "checkpoints" / ".step-00000008.partial").mkdir()
    result = run(data, directory)
    assert (result.finished, result.step) == (True, 6)
    assert_same(directory, whole)
    assert not list((directory / "checkpoints").glob(".*"))


def test_a_run_without_a_checkpoint_begins_again(data: Path, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 5.0}\n')
    run(data, tmp_path)
    assert_same(tmp_path, whole)


def test_more_steps_go_on_from_a_finished_run(data: Path, whole: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    run(data, directory, dataclasses.replace(RUN, steps=4))
    run(data, directory, RUN)
    assert_same(directory, whole)


def test_a_damaged_checkpoint_is_passed_over(data: Path, whole: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    shutil.copytree(whole, directory)
    newest = directory / "checkpoints" / "step-00000006" / "training.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    run(data, directory)
    assert_same(directory, whole)


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """As checkpoints of before, whose state.json has no digest."""
    tensors = load_file(folder / "training.safetensors")
    change(tensors)
    save_file(tensors, folder / "training.safetensors")
    edit_state(folder, digests=None, files={name: (folder / name).stat().st_size for name in FILES})


def edit_state(folder: Path, **changes: Any) -> None:
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "digest": None, **changes}))


FILES = ("salad.safetensors", "training.safetensors")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t["exp_avg/blocks.0.attn1.salad.gate_weight"].fill_(float("nan")), "exp_avg.* holds NaN"),
        (lambda t: t.update({"exp_avg/blocks.0.attn1.salad.gate_weight": torch.ones(2)}), "has shape"),
        (lambda t: t.update({"exp_avg/blocks.7.attn1.salad.gate_weight": torch.ones(2)}), r"blocks\.7"),
        (lambda t: t.update({"exp_avg/blocks.0.attn1.salad.gate_weight": torch.ones(2).int()}), "int32"),
    ],
)
def test_moments_that_cannot_be_used(data: Path, whole: Path, tmp_path: Path, change: Any, said: str) -> None:
    shutil.copytree(whole, tmp_path / "run")
    edit_tensors(tmp_path / "run" / "checkpoints" / "step-00000006", change)
    with pytest.raises(ResumeError, match=said):
        run(data, tmp_path / "run", dataclasses.replace(RUN, steps=8))


def test_a_changed_byte_of_the_moments_is_told(data: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    file = tmp_path / "run" / "checkpoints" / "step-00000006" / "training.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(ResumeError, match="digest"):
        run(data, tmp_path / "run", dataclasses.replace(RUN, steps=8))


@pytest.mark.parametrize("change", [{"step": 5}, {"step": 2**60}, {"files": {"../a": 1, "b": 2}}, {"settings": None}])
def test_a_state_that_is_not_of_its_directory_is_passed_over(
    data: Path, whole: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    edit_state(tmp_path / "run" / "checkpoints" / "step-00000006", **change)
    run(data, tmp_path / "run")
    assert_same(tmp_path / "run", whole)


@pytest.mark.parametrize(
    "damage",
    [
        b"\0" * 5000,
        b"\xff\xfe garbage \x80\n",
        b'{"step": "two"}\n[1]\n7\n',
        b"[" * 100_000 + b"\n",
        b'{"step": 7, "lo',
        b'{"step": 4, "seconds": "x"}\n{"step": 4, "validation_loss": NaN}\n{"step": 4, "validation_data": []}\n',
    ],
    ids=["nul", "bytes", "other", "deep", "torn", "kinds"],
)
def test_a_damaged_log_never_makes_a_checkpoint_unusable(
    data: Path, whole: Path, tmp_path: Path, damage: bytes
) -> None:
    """Of a loss of power: lines after the last checkpoint are gone, and there is something else."""
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")
    log = tmp_path / "run" / "log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(line for line in lines if json.loads(line)["step"] <= 4) + damage)
    assert [line["step"] for line in read_log(tmp_path / "run") if "loss" in line] == [1, 2, 3, 4]
    run(data, tmp_path / "run")
    assert_same(tmp_path / "run", whole)


def test_lines_are_on_the_disk_before_the_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from salad_compile.training.records import Records

    seen: list[tuple[list[int], int]] = []
    real = Records.sync

    def sync(self: Records) -> None:
        real(self)
        steps = [line["step"] for line in read_log(tmp_path) if "loss" in line]
        seen.append((steps, len(list((tmp_path / "checkpoints").glob("step-*")))))

    monkeypatch.setattr(Records, "sync", sync)
    run(data, tmp_path, dataclasses.replace(RUN, steps=4))
    assert seen == [([1, 2], 0), ([1, 2, 3, 4], 1)]


def test_two_runs_do_not_share_a_directory(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_module, "WAIT_SECONDS", 0.1)
    (tmp_path / "checkpoints").mkdir()
    with hold(tmp_path / "checkpoints"), pytest.raises(WriteError, match="another process is writing"):
        run(data, tmp_path)
    assert not (tmp_path / "log.jsonl").exists()


def test_only_the_last_checkpoints_stay(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path, dataclasses.replace(RUN, checkpoint_every=1, keep_last=2))
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-00000005", "step-00000006"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_writes_a_checkpoint(
    data: Path, whole: Path, tmp_path: Path, number: signal.Signals
) -> None:
    calls = 0
    before = signal.getsignal(number)

    def forward(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 5:  # in the third step: two micro-batches each
            os.kill(os.getpid(), number)
        return wan_forward(*args)

    settings = dataclasses.replace(RUN, checkpoint_every=100)
    result = run(data, tmp_path, settings, forward=forward, validation=None)
    assert (result.finished, result.step, result.file, result.signal) == (False, 3, None, number)
    assert result.checkpoint == tmp_path / "checkpoints" / "step-00000003"
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000003"]
    assert signal.getsignal(number) is before
    assert not (tmp_path / "salad.safetensors").exists()
    settings = dataclasses.replace(RUN, validation_every=0)
    assert run(data, tmp_path, settings).finished
    losses = [line["loss"] for line in read_log(tmp_path) if "loss" in line]
    assert losses == [line["loss"] for line in read_log(whole) if "loss" in line]


def test_results_of_a_run_that_went_on_do_not_look_current(
    data: Path, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "run"
    run(data, directory, dataclasses.replace(RUN, steps=2))
    assert file_at(directory) == directory / "salad.safetensors"
    first = (directory / "salad.safetensors").read_bytes()

    def forward(*args: Any) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGTERM)
        return wan_forward(*args)

    result = run(data, directory, forward=forward, validation=None)
    assert (result.step, result.signal) == (3, signal.SIGTERM)
    assert "salad-step-00000002.safetensors" in caplog.text
    assert (directory / "salad-step-00000002.safetensors").read_bytes() == first
    assert not (directory / "salad.safetensors").exists()
    assert not (directory / "training.json").exists()
    assert file_at(directory) == directory / "checkpoints" / "step-00000003" / "salad.safetensors"
    assert "is not finished: its newest checkpoint is taken" in caplog.text


def test_an_older_result_beside_newer_checkpoints_is_told(
    data: Path, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As a run of an earlier release, or a file of `convert` that the run started from, leaves it."""
    shutil.copytree(whole, tmp_path / "run")
    summary = tmp_path / "run" / "training.json"
    summary.write_text(json.dumps({**json.loads(summary.read_text()), "steps": 4, "digest": None}))
    assert file_at(tmp_path / "run").parent.name == "step-00000006"
    assert "went on after step 4" in caplog.text
    file = tmp_path / "run" / "salad.safetensors"
    assert file_at(file) == file
    assert "left out" in caplog.text
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert file_at(tmp_path / "run") == file


def test_room_for_one_checkpoint_is_asked_for_at_the_start(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 5000))  # type: ignore[attr-defined]
    with pytest.raises(WriteError, match="has room for 0 MiB, and a checkpoint takes"):
        run(data, tmp_path)
    assert not (tmp_path / "log.jsonl").exists()


def test_a_target_that_cannot_be_written_is_one_sentence(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file is a file: name a directory") as caught:
        run(data, tmp_path / "file" / "run")
    assert "\n" not in str(caught.value)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))  # a full disk, as the kernel tells it
    try:
        with quiet(True), pytest.raises(WriteError, match=r"log\.jsonl could not be written"):  # stderr is a file, too
            run(data, tmp_path / "full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Broken(LatentDataset):
    """A dataset in which some items are NaN; `open_latents` would have told, so it comes from elsewhere."""

    def __init__(self, latents: LatentDataset, broken: Sequence[int]) -> None:
        self.latents, self.broken, self.names, self.shapes = latents, broken, latents.names, latents.shapes

    def __getitem__(self, number: int) -> LatentItem:
        item = self.latents[number]
        return dataclasses.replace(item, latent=item.latent * float("nan")) if number in self.broken else item


def broken_at_the_second_step(data: Path) -> Broken:
    given = open_latents(data / "latents")
    batches = ShapeBatches(given.shapes, RUN.batch, seed=RUN.seed)
    return Broken(given, [next(index for index in batches.at(1) if index not in batches.at(0))])


def test_a_loss_that_is_not_finite_names_the_items_and_changes_nothing(data: Path, tmp_path: Path) -> None:
    bad, model = broken_at_the_second_step(data), converted()
    with pytest.raises(TrainingError, match=f"step 2: the loss of {bad.names[bad.broken[0]]} is not finite"):
        train(model, bad, dataclasses.replace(RUN, checkpoint_every=1), tmp_path)
    assert [line["step"] for line in read_log(tmp_path)] == [1]
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000001"]
    saved = load_file(tmp_path / "checkpoints" / "step-00000001" / "salad.safetensors")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(torch.equal(parameter, saved[name]) for name, parameter in trained.items())


def test_steps_with_such_a_loss_can_be_left_out(data: Path, tmp_path: Path) -> None:
    bad = broken_at_the_second_step(data)
    train(converted(), bad, dataclasses.replace(RUN, on_non_finite="skip"), tmp_path)
    skipped = [line["step"] for line in read_log(tmp_path) if line.get("loss", 0) is None]
    assert skipped[0] == 2
    assert len(skipped) < 4
    final = load_file(tmp_path / "salad.safetensors")
    assert all(tensor.isfinite().all() for tensor in final.values())


def test_a_run_of_which_every_step_was_left_out_is_an_error(data: Path, tmp_path: Path) -> None:
    given = open_latents(data / "latents")
    bad, settings = Broken(given, range(len(given))), dataclasses.replace(RUN, on_non_finite="skip")
    for _ in range(2):  # and resumed
        with pytest.raises(TrainingError, match=f"nothing was trained: no loss of the {RUN.steps} steps was finite"):
            train(converted(), bad, settings, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["checkpoints", "log.jsonl"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"settings": dataclasses.replace(RUN, learning_rate=1.0)}, r"learning_rate \(was 0.01, is 1.0\)"),
        ({"settings": dataclasses.replace(RUN, seed=1, ema_decay=0.5)}, r"ema_decay.*seed"),
        ({"settings": dataclasses.replace(RUN, steps=5)}, "beyond steps=5"),
        ({"resume": False}, "holds a run already"),
        ({"items": 8}, "data: the latents"),
        ({"weights": 1.01}, "base_weights"),
        ({"config": dataclasses.replace(CONFIG, sparsity=0.6)}, r"sparsity \(was 0.7, is 0.6\)"),
        ({"config": CONFIG, "layers": 2}, "base_digest"),
    ],
)
def test_a_run_does_not_go_on_as_another(
    data: Path, whole: Path, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    model = converted()
    if "config" in change:
        model = base(num_layers=change.get("layers", 1))
    if "weights" in change:
        model.blocks[0].ffn.net[2].weight.data *= change["weights"]
    items_ = latents(tmp_path / "other", change["items"]) if "items" in change else open_latents(data / "latents")
    settings = change.get("settings", RUN)
    with pytest.raises(ResumeError, match=said):
        train(model, items_, settings, whole, config=change.get("config"), resume=change.get("resume", True))
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before


def test_what_does_not_fit_is_told_before_anything_is_written(data: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    with pytest.raises(NotConvertedError, match="config=SaladConfig"):
        run(data, directory, model=base(num_layers=1))
    for change, said in (({"lowest_sparsity": None}, "lowest_sparsity"), ({"train_base": True}, "train_base")):
        with pytest.raises(ConfigError, match=said):
            run(data, directory, model=base(num_layers=1), config=dataclasses.replace(CONFIG, **change))
    with pytest.raises(ConfigError, match="text of 'clip"):
        run(data, tmp_path / "text", dataclasses.replace(RUN, text_tokens=5))
    assert not directory.exists()


def test_a_checkpoint_that_cannot_be_written_leaves_the_earlier_ones(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import salad_compile.training.checkpoints as checkpoints

    real = checkpoints.flush_to_disk

    def full(path: Path) -> None:
        if path.parent.name.startswith(".step-00000004"):
            raise OSError(28, "No space left on device")
        real(path)

    monkeypatch.setattr(checkpoints, "flush_to_disk", full)
    with pytest.raises(TrainingError, match=r"step 4 could not be written.*No space left"):
        run(data, tmp_path)
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000002"]


def test_reading_ahead_in_other_processes_changes_nothing(data: Path, whole: Path, tmp_path: Path) -> None:
    run(data, tmp_path, dataclasses.replace(RUN, workers=1))
    assert_same(tmp_path, whole)


def test_tensorboard_gets_what_the_log_says(data: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(data, tmp_path, dataclasses.replace(RUN, trackers=("tensorboard",), steps=2))
    (folder,) = {path.parent for path in tmp_path.rglob("events.out*") if path.parent.name == "trackers"}
    events = EventAccumulator(str(folder))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    expected = [(line["step"], line["loss"]) for line in read_log(tmp_path) if "loss" in line]
    assert [step for step, _ in found] == [step for step, _ in expected]
    assert [value for _, value in found] == pytest.approx([value for _, value in expected])


def test_a_model_of_another_signature_trains_with_a_forward_of_its_own(data: Path, whole: Path, tmp_path: Path) -> None:
    def forward(model: Any, noisy: torch.Tensor, timesteps: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = model(noisy, timesteps, texts).sample
        return answer

    run(data, tmp_path, forward=forward)
    assert_same(tmp_path, whole)


def test_latents_of_several_shapes(data: Path, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(data / "latents", mixed)
    write_latents(
        (LatentItem(f"wide{i}", torch.randn(4, 2, 8, 12), item.text) for i, item in enumerate(items(4))),
        mixed,
    )
    result = train(converted(), open_latents(mixed), RUN, tmp_path / "run")
    assert result.finished
