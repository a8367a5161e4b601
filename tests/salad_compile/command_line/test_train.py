from __future__ import annotations

import json
import re
import runpy
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import salad_compile
from salad_compile.command_line import WRONG
from salad_compile.command_line import train as train_command
from salad_compile.latents import LatentStatistics, open_latents, write_latents
from salad_compile.training import read_log
from tests.salad_compile.command_line.conftest import Run
from tests.salad_compile.training.tiny import SETTINGS, base, converted, write_run

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "finetune.py"


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("given")
    write_run(root, SETTINGS)
    salad_compile.save(converted(), root / "salad.safetensors")
    return root


def words(given: Path, output: Path, *more: object) -> list[object]:
    named = ("--model", given / "model", "--latents", given / "latents", "--output", output)
    return [*named, "--settings", given / "settings.json", *more]


def test_a_run_and_its_continuation(command: Run, given: Path, tmp_path: Path) -> None:
    conversion = ("--conversion", given / "conversion.json", "--validation", given / "held-out")
    outcome = command("train", *words(given, tmp_path, *conversion, "--steps", 2))
    assert outcome.code == 0
    assert f"wrote {tmp_path}/salad.safetensors: 2 steps, loss " in outcome.out
    number = r"\d\.\d+"
    losses = rf"validation {number} untrained, {number} now, dense {number}: .*; \d+ s"
    next_ = f"next: salad-compile export --model {given}/model --salad {tmp_path} --output {tmp_path}-exported"
    assert re.search(rf"^{losses}; {re.escape(next_)}$", outcome.out, re.MULTILINE)
    assert re.search(rf"^step 0: validation {number} untrained", outcome.err, re.MULTILINE)
    assert re.search(rf"^step 2: validation {number}", outcome.err, re.MULTILINE)
    found = command("train", *words(given, tmp_path, *conversion, "--set", "steps=3", "--json")).json()
    assert (found["finished"], found["step"], found["file"]) == (True, 3, f"{tmp_path}/salad.safetensors")
    assert found["validation_loss"] == read_log(tmp_path)[-2]["validation_loss"]
    assert found["outcome"]["sentence"] == read_log(tmp_path)[-1]["result"]
    assert [line["step"] for line in read_log(tmp_path)] == [0, 1, 2, 2, 3, 3, 3]
    model = salad_compile.load(base(num_layers=1), tmp_path)
    assert salad_compile.summary(model).sites[0].target_sparsity == pytest.approx(0.7)


def test_a_dry_run_tells_and_writes_nothing(command: Run, given: Path, tmp_path: Path) -> None:
    conversion = ("--conversion", given / "conversion.json", "--validation", given / "held-out", "--dry-run")
    outcome = command("train", *words(given, tmp_path / "run", *conversion))
    assert outcome.code == 0
    assert re.match(
        r"6 steps of 4 samples take \d+ s: \S+ s a step, .*\npeak memory .*GiB\n.* on the disk", outcome.out
    )
    found = command("train", *words(given, tmp_path / "run", *conversion, "--json")).json()
    assert found["hours"] * 3600 == pytest.approx(found["seconds"])
    assert not list(tmp_path.iterdir())


def test_samples_are_decoded_by_the_vae_of_the_pipeline(command: Run, given: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderKLWan

    pipe = tmp_path / "pipeline"
    shutil.copytree(given / "model", pipe / "transformer")
    index = {"transformer": ["diffusers", "WanTransformer3DModel"], "vae": ["diffusers", "AutoencoderKLWan"]}
    (pipe / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline", **index}))
    more = ("--model", pipe, "--conversion", given / "conversion.json", "--steps", 1)
    sampled = ("--set", "sample_every=1", "--set", "sample_steps=2")
    outcome = command("train", *words(given, tmp_path / "run"), *more, *sampled)
    assert outcome.code == WRONG
    assert "sample_every needs the VAE" in outcome.err
    sizes = {"base_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "temperal_downsample": [False, True, True]}
    statistics = {"latents_mean": [0.1] * 4, "latents_std": [2.0] * 4}
    AutoencoderKLWan(z_dim=4, **sizes, **statistics).save_pretrained(pipe / "vae")
    outcome = command("train", *words(given, tmp_path / "run"), *more, *sampled)
    assert outcome.code == 0
    assert sorted(path.name for path in (tmp_path / "run" / "samples").iterdir()) == [
        "step-00000000-0.png",
        "step-00000001-0.png",
    ]


@pytest.fixture
def experts(given: Path, tmp_path: Path) -> Path:
    """A pipeline as of Wan 2.2."""
    pipe = tmp_path / "pipeline"
    for name in ("transformer", "transformer_2"):
        shutil.copytree(given / "model", pipe / name)
    index = {name: ["diffusers", "WanTransformer3DModel"] for name in ("transformer", "transformer_2")}
    (pipe / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline", **index, "boundary_ratio": 0.875}))
    return pipe


def test_both_experts_are_trained_on_their_own_noise(command: Run, given: Path, experts: Path, tmp_path: Path) -> None:
    more = ("--conversion", given / "conversion.json", "--steps", 1)
    outcome = command("train", *words(given, tmp_path / "run", *more), "--model", experts)
    assert outcome.code == 0
    for name, noise in (("transformer", (0.875, 1.0)), ("transformer_2", (0.0, 0.875))):
        settings = json.loads((tmp_path / "run" / name / "training.json").read_text())["settings"]
        assert (settings["lowest_noise"], settings["highest_noise"]) == noise
    both = f"--salad {tmp_path}/run/transformer --salad-2 {tmp_path}/run/transformer_2"
    assert f"next: salad-compile export --model {experts} {both} --output" in outcome.err


def test_a_dry_run_of_both_experts_sums_them(command: Run, given: Path, experts: Path, tmp_path: Path) -> None:
    more = ("--conversion", given / "conversion.json", "--steps", 1, "--dry-run", "--model", experts)
    found = command("train", *words(given, tmp_path / "run", *more), "--json").json()
    first, second = (found["experts"][name] for name in ("transformer", "transformer_2"))
    assert found["seconds"] == pytest.approx(first["seconds"] + second["seconds"])
    assert found["hours"] == pytest.approx(found["seconds"] / 3600)
    assert found["disk"] == first["disk"] + second["disk"]
    assert found["peak_memory"] == max(first["peak_memory"], second["peak_memory"])
    assert found["steps"] == 2
    outcome = command("train", *words(given, tmp_path / "run", *more))
    lines = outcome.out.splitlines()
    assert lines[0] == "transformer"
    assert lines[4] == "transformer_2"
    assert lines[8].startswith("both, one after the other: 2 steps of")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("scheduler", "more", "said", "shift"),
    [
        ({"shift": 7.0}, [], "flow_shift 7, of {pipe}/scheduler/scheduler_config.json; --set flow_shift=", 7.0),
        ({"shift": 7.0}, ["--set", "flow_shift=2"], "flow_shift 2, as it was set", 2.0),
        (None, [], "flow_shift 5, the default, since no scheduler", 5.0),
        ({"shift": -1}, [], "{pipe}/scheduler/scheduler_config.json: the scheduler's shift is -1, and no number", None),
    ],
)
def test_the_shift_is_that_of_the_scheduler(
    command: Run,
    given: Path,
    experts: Path,
    tmp_path: Path,
    scheduler: dict[str, float] | None,
    more: list[str],
    said: str,
    shift: float | None,
) -> None:
    if scheduler is not None:
        (experts / "scheduler").mkdir()
        (experts / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    free = {key: value for key, value in SETTINGS.to_dict().items() if key != "flow_shift"}
    (tmp_path / "free.json").write_text(json.dumps(free))
    rest = ("--conversion", given / "conversion.json", "--settings", tmp_path / "free.json", "--steps", 1, *more)
    model = experts / "transformer" if more else experts  # a model of a pipeline finds it as well
    outcome = command("train", *words(given, tmp_path / "run"), *rest, "--model", model, "--component", "transformer")
    assert said.format(pipe=experts) in outcome.err
    assert outcome.code == (0 if shift else WRONG)
    if shift is None:
        assert not (tmp_path / "run").exists()
    else:
        settings = json.loads((tmp_path / "run" / "training.json").read_text())["settings"]
        assert settings["flow_shift"] == shift


def test_one_expert_by_a_word(command: Run, given: Path, experts: Path, tmp_path: Path) -> None:
    more = ("--conversion", given / "conversion.json", "--steps", 1, "--component", "transformer_2")
    assert command("train", *words(given, tmp_path / "run", *more), "--model", experts).code == 0
    settings = json.loads((tmp_path / "run" / "training.json").read_text())["settings"]
    assert (settings["lowest_noise"], settings["highest_noise"]) == (0.0, 0.875)


def test_an_expert_without_its_noise_is_one_sentence(command: Run, given: Path, experts: Path, tmp_path: Path) -> None:
    index = json.loads((experts / "model_index.json").read_text())
    (experts / "model_index.json").write_text(json.dumps({**index, "boundary_ratio": None}))
    for more, said in (
        ((), "no boundary_ratio"),
        (("--component", "transformer_2"), "no boundary_ratio"),
        (("--set", "lowest_noise=0.5"), "say which, --component"),
        (("--set", "first_frame_conditioning_p=0.5"), "is no TI2V"),
    ):
        outcome = command("train", *words(given, tmp_path / "run", *more), "--model", experts)
        assert outcome.code == WRONG
        assert said in outcome.err
        assert len(outcome.err.strip().splitlines()) == 1
    for boundary in (1.5, "0.875", True):
        (experts / "model_index.json").write_text(json.dumps({**index, "boundary_ratio": boundary}))
        outcome = command("train", *words(given, tmp_path / "run"), "--model", experts)
        assert outcome.code == WRONG
        assert f"is {boundary!r}: where the noise of one expert ends" in outcome.err
    assert not (tmp_path / "run").exists()


def test_data_of_another_vae_are_one_sentence(command: Run, given: Path, tmp_path: Path) -> None:
    """The data state their statistics, and so does the VAE beside the transformer."""
    items = list(open_latents(given / "latents", sample=0))
    channels = items[0].latent.shape[0]
    write_latents(items, tmp_path / "data", statistics=LatentStatistics((0.0,) * channels, (2.0,) * channels))
    shutil.copytree(given / "model", tmp_path / "wan" / "transformer")
    (tmp_path / "wan" / "vae").mkdir()
    (tmp_path / "wan" / "model_index.json").write_text("{}")
    said = {"_class_name": "AutoencoderKLWan", "latent_channels": channels, "scaling_factor": 0.25}
    (tmp_path / "wan" / "vae" / "config.json").write_text(json.dumps(said))
    wrong = ("--model", tmp_path / "wan" / "transformer", "--latents", tmp_path / "data")
    outcome = command("train", *words(given, tmp_path / "run", *wrong))
    assert outcome.code == WRONG
    assert "they are of another model" in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1
    (tmp_path / "wan" / "vae" / "config.json").write_text(json.dumps({**said, "scaling_factor": "small"}))
    outcome = command("train", *words(given, tmp_path / "run", *wrong))
    assert outcome.code == WRONG
    assert "the statistics in the configuration of the VAE are no numbers" in outcome.err
    assert not (tmp_path / "run").exists()


def test_from_a_file_of_branches(command: Run, given: Path, tmp_path: Path) -> None:
    salad = ("--salad", given / "salad.safetensors", "--steps", 1)
    assert command("train", *words(given, tmp_path, *salad)).code == 0
    assert load_file(tmp_path / "salad.safetensors").keys() == load_file(given / "salad.safetensors").keys()
    outcome = command("train", *words(given, tmp_path, *salad, "--convert", "sparsity=0.5"))
    assert outcome.code == WRONG
    assert "leave --conversion, --convert out" in outcome.err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--set", "learning_rat=1"], "Did you mean 'learning_rate'"),
        (["--set", "steps"], "--set takes FIELD=VALUE"),
        (["--convert", "sparsit=0.5"], "Did you mean 'sparsity'"),
        (["--processes", "99999"], "must be a multiple of micro_batch x processes"),
        (["--processes", "0"], "--processes takes a number of at least 1"),
        (["--settings", "missing.json"], "missing.json"),
        (["--forward", "nowhere:f", "--convert", "min_tokens=16"], "'nowhere' cannot be imported"),
    ],
)
def test_wrong_words(command: Run, given: Path, tmp_path: Path, more: list[str], said: str) -> None:
    outcome = command("train", *words(given, tmp_path / "run", *more))
    assert outcome.code == WRONG
    assert said in outcome.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_dry_run_without_room_ends_with_1(
    given: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    monkeypatch.setattr(train_command, "START_METHOD", "fork")
    monkeypatch.setattr(train_command, "_estimate_all", lambda *given: 1)
    code = salad_compile.command_line.main(
        ["train", *map(str, words(given, tmp_path / "run", "--dry-run", "--processes", processes))]
    )
    assert code == 1
    assert "Traceback" not in capfd.readouterr().err


def test_damaged_items_are_an_error_or_skipped(command: Run, given: Path, tmp_path: Path) -> None:
    shutil.copytree(given / "latents", tmp_path / "latents")
    file = tmp_path / "latents" / "items" / "clip4.safetensors"
    file.write_bytes(file.read_bytes()[:-8] + b"\xff" * 8)
    given_words = words(
        given,
        tmp_path / "run",
        "--conversion",
        given / "conversion.json",
        "--latents",
        tmp_path / "latents",
        "--steps",
        3,
    )
    outcome = command("train", *given_words)
    assert outcome.code == WRONG
    assert "clip4" in outcome.err
    assert command("train", *given_words, "--skip").code == 0


def test_a_process_that_fails_says_why_once(
    given: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The processes find no latents. test_train_kill.py has the rest."""
    monkeypatch.setattr(train_command, "START_METHOD", "fork")
    given_words = words(given, tmp_path, "--processes", 2, "--latents", tmp_path / "nowhere")
    code = salad_compile.command_line.main(["train", *map(str, given_words)])
    said = capfd.readouterr().err
    assert code == WRONG
    assert "nowhere" in said
    assert "terminated with exit code 2; its own message is above" in said
    assert "Traceback" not in said


def test_the_example_does_the_same(
    command: Run, given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    conversion = ("--conversion", given / "conversion.json", "--steps", 2)
    assert command("train", *words(given, tmp_path / "command", *conversion)).code == 0
    monkeypatch.setattr(sys, "argv", ["finetune.py", *map(str, words(given, tmp_path / "example", *conversion))])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert "lora/pytorch_lora_weights.safetensors" in capsys.readouterr().out
    losses = [[line.get("loss") for line in read_log(tmp_path / name)] for name in ("command", "example")]
    assert losses[0] == losses[1]
    exported = tmp_path / "example" / "export" / "salad.safetensors"
    assert load_file(exported).keys() == load_file(tmp_path / "command" / "salad.safetensors").keys()


def test_lines_without_a_terminal(command: Run, given: Path, tmp_path: Path) -> None:
    conversion = ("--conversion", given / "conversion.json", "--validation", given / "held-out")
    more = ("--steps", 3, "--set", "log_every=1", "--set", "validation_every=2")
    outcome = command("train", *words(given, tmp_path / "a", *conversion, *more))
    lines = [line for line in outcome.err.splitlines() if line.startswith("train: ")]
    assert [line.split(",")[0] for line in lines] == ["train: 1/3", "train: 2/3", "train: 3/3"]
    assert re.search(r"loss \d+\.\d+, validation \d+\.\d+, .* steps/s, \d+\.\d GiB, 0:00:00 left", lines[-1])
    for option, said in (("-q", False), ("-v", True)):
        outcome = command("train", *words(given, tmp_path / option, *conversion, *more), option)
        assert outcome.code == 0
        assert ("train: 1/3" in outcome.err) == said
        assert ("INFO: saved" in outcome.err) == said


STOPPING = """
import os
def forward(model, noisy, timesteps, texts):
    os.kill(os.getpid(), {number})
    return model(noisy, timesteps, texts, return_dict=False)[0]
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_is_no_success_and_exports_its_newest_state(
    command: Run, given: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """`train && export` after Ctrl-C."""
    conversion = ("--conversion", given / "conversion.json")
    assert command("train", *words(given, tmp_path / "run", *conversion, "--steps", 1)).code == 0
    (tmp_path / "stop.py").write_text(STOPPING.format(number=int(number)))
    more = ("--steps", 5, "--forward", f"{tmp_path}/stop.py:forward")
    outcome = command("train", *words(given, tmp_path / "run", *conversion, *more))
    assert outcome.code == 128 + number
    assert "stopped after step 2 of 5" in outcome.out
    newest = tmp_path / "run" / "checkpoints" / "step-00000002"
    assert str(newest) in outcome.out
    words_of_export = ("--model", given / "model", "--salad", tmp_path / "run", "--output", tmp_path / "out")
    exported = command("export", *words_of_export, "--formats", "salad")
    assert exported.code == 0
    assert exported.err.count(f"its newest checkpoint is taken, {newest}") == 1
    expected, actual = (load_file(folder / "salad.safetensors") for folder in (newest, tmp_path / "out"))
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
