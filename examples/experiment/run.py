"""Train the dense model, then every arm from it, and write the tables of docs/evidence.md.

    python examples/experiment/run.py dense                      pre-train; writes assets/dense.safetensors
    python examples/experiment/run.py arm salad --seed 0         one row
    python examples/experiment/run.py all --seeds 0 1 2          all rows that are not in the results yet
    python examples/experiment/run.py table                      docs/evidence.md from the results

`--tiny` runs everything in seconds on a CPU; its numbers mean nothing and go to out/. See docs/evidence.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import evidence
import results
import torch
import torch.nn as nn
from arms import ARMS, Arm, UnknownArmError, arm_named, build, drop, recipe_of, settings_of
from flow import held_out_loss, held_out_triples, psnr, sample, ssim
from model import VideoDiT
from presets import FULL, TINY, Preset
from safetensors.torch import load_file, save_file
from train import Training, train

import salad_compile
from salad_compile.backend import salad
from salad_compile.common.files import write_at_once

ASSETS = Path(__file__).resolve().parent / "assets"


@dataclasses.dataclass(frozen=True)
class Place:
    """Device, sizes and files of a run.

    Attributes:
        base: the dense weights. tuned: folder of trained branches. kept: folder of checkpoints to resume from.
        compiled: whether models are compiled.
    """

    device: torch.device
    preset: Preset
    base: Path
    tuned: Path
    kept: Path
    rows: Path
    compiled: bool


def save_dense(model: VideoDiT, path: Path) -> None:
    """Write the weights in fp16, under a temporary name first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_at_once(path) as temporary:
        save_file({name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}, temporary)


def load_dense(path: Path, preset: Preset, device: torch.device) -> VideoDiT:
    """The pre-trained model in fp32; its weights are those of the file, which are fp16."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: run `python examples/experiment/run.py dense` first.")
    model = VideoDiT(preset.model)
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    return model.to(device)


def compile_blocks(model: nn.Module, arm: Arm | None, place: Place) -> None:
    """Compile each block, through our backend where the model is converted. One graph serves all blocks and seeds."""
    if place.compiled:
        for block in model.blocks:  # type: ignore[union-attr]
            # not by its name, which only an installation makes known
            block.compile(backend=salad if arm is not None and arm.kind == "salad" else "inductor", dynamic=False)


def pretrain(place: Place) -> None:
    """Train the dense model, resuming from its checkpoint."""
    preset = place.preset
    torch.manual_seed(preset.dense.seed)
    model = VideoDiT(preset.model).to(place.device)
    training = Training(model, preset.dense)

    def keep_mean() -> None:
        mean = VideoDiT(preset.model)
        mean.load_state_dict({**model.state_dict(), **training.mean})
        save_dense(mean, place.base)

    log = place.kept / "dense.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    compile_blocks(model, None, place)
    train(
        training,
        model,
        preset.model.clip,
        place.device,
        title="dense",
        checkpoint=place.kept / "dense.pt",
        log=log,
        on_checkpoint=keep_mean,
    )
    training.use_mean()
    save_dense(model, place.base)
    print(f"wrote {place.base}")


def run_arm(arm: Arm, seeds: Sequence[int], place: Place) -> None:
    """Run one arm with each seed and append its rows. The model is compiled once for all seeds."""
    preset, device = place.preset, place.device
    model = build(arm, load_dense(place.base, preset, device), preset, device, seeds[0])
    if arm.trained:
        compile_blocks(model, arm, place)
    teacher = None
    if arm.teacher:
        teacher = load_dense(place.base, preset, device).requires_grad_(False)
        compile_blocks(teacher, None, place)
    for seed in seeds:
        start = time.perf_counter()
        last = None
        if arm.trained:
            last = _tune(arm, model, seed, place, teacher)
        elif arm.of:
            model = _load_and_drop(arm, seed, place)
        tuned_at = time.perf_counter()
        with torch.compiler.set_stance("force_eager"):  # other batch sizes would be compiled anew
            judged = _judge(model, place)
        row = {
            "arm": arm.name,
            "seed": seed,
            **judged,
            "training_loss": last,
            "sparsity": _sparsity(model),
            "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad) if arm.trained else 0,
            "training_seconds": round(tuned_at - start, 1),
            "seconds": round(time.perf_counter() - start, 1),
            "settings": settings_of(arm, preset, seed),
            **results.about_this_run(device),
        }
        results.append(place.rows, row)
        print(f"{arm.name} {seed}: held-out loss {row['held_out_loss']:.5f}, PSNR {row['psnr']:.2f} dB", flush=True)


def _tune(arm: Arm, model: nn.Module, seed: int, place: Place, teacher: nn.Module | None = None) -> float:
    """Train from the dense weights and fresh new parameters; keeps a converted model's branches in a file."""
    fresh = build(arm, load_dense(place.base, place.preset, place.device), place.preset, place.device, seed)
    model.load_state_dict(fresh.state_dict())
    training = Training(model, recipe_of(arm, place.preset, seed))
    title = f"{arm.name} {seed}"
    last = train(training, model, place.preset.model.clip, place.device, title=title, teacher=teacher)
    if arm.kind == "salad":
        place.tuned.mkdir(parents=True, exist_ok=True)
        salad_compile.save(model, place.tuned / f"{arm.name}-{seed}.safetensors")
    return last


def _judge(model: nn.Module, place: Place) -> dict[str, Any]:
    """The held-out loss, and how similar the arm's samples are to the dense model's, from the same noise."""
    preset, clip = place.preset, place.preset.model.clip
    loss, by_level = held_out_loss(
        model, held_out_triples(preset.held_out, clip, place.device), preset.evaluation_batch
    )
    start = held_out_triples(preset.samples, clip, place.device)
    dense = load_dense(place.base, preset, place.device)
    reference = sample(dense, start.noise, start.labels, preset.sampler_steps)
    clips = sample(model, start.noise, start.labels, preset.sampler_steps)
    alike = {"psnr": psnr(clips, reference), "ssim": ssim(clips, reference)}
    return {"held_out_loss": loss, "held_out_by_level": by_level, **alike}


def _load_and_drop(arm: Arm, seed: int, place: Place) -> nn.Module:
    """The trained model of another arm, without the branches that this one drops."""
    path = place.tuned / f"{arm.of}-{seed}.safetensors"
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: run `python examples/experiment/run.py arm {arm.of}` first.")
    model = salad_compile.load(load_dense(place.base, place.preset, place.device), path)
    drop(arm, model, place.preset, place.device)
    return model


def _sparsity(model: nn.Module) -> float | None:
    """The mean measured sparsity of the converted sites."""
    found = [getattr(m, "measured_sparsity", None) for m in model.modules()]
    known = [value for value in found if value is not None]
    return sum(known) / len(known) if known else None


def missing(names: Sequence[str], seeds: Sequence[int], place: Place) -> list[tuple[Arm, list[int]]]:
    """The arms that have no row yet, with the seeds that are missing."""
    done = {results.key(row) for row in results.read(place.rows)}
    wanted = [arm_named(name) for name in names] if names else list(ARMS)
    left = []
    for arm in wanted:
        own = seeds if arm.trained or arm.of else [0]
        rest = [seed for seed in own if (arm.name, seed, place.preset.tune.rate) not in done]
        left += [(arm, rest)] if rest else []
    return left


def run_all(names: Sequence[str], seeds: Sequence[int], place: Place) -> int:
    """Run what is missing; report an arm that fails and go on with the others. Returns how many failed."""
    failed = 0
    for arm, rest in missing(names, seeds, place):
        try:
            run_arm(arm, rest, place)
        except Exception as error:  # the rows of the other arms do not depend on this one
            failed += 1
            print(f"{arm.name}: FAILED, {type(error).__name__}: {error}", flush=True)
        torch._dynamo.reset()
    return failed


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="sizes that only check that it runs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true", help="run uncompiled")
    parser.add_argument("--steps", type=int, help="training steps, instead of the preset's")
    parser.add_argument("--rate", type=float, help="highest learning rate, instead of the preset's")
    parser.add_argument("--base", type=Path, help="the dense weights; default assets/dense.safetensors")
    parser.add_argument("--tuned", type=Path, help="folder of trained branches; default out/experiment")
    parser.add_argument(
        "--results", type=Path, help="the file of rows; default benchmarks/results/experiment_<gpu>.jsonl"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("dense", help="pre-train the dense model")
    one = commands.add_parser("arm", help="one row, also if it is there already")
    one.add_argument("name")
    one.add_argument("--seed", type=int, default=0)
    many = commands.add_parser("all", help="all rows that are missing")
    many.add_argument("--arms", nargs="*", default=[], help="only these")
    many.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    commands.add_parser("table", help="write docs/evidence.md")
    return parser.parse_args(given)


def _place(options: argparse.Namespace) -> Place:
    device = torch.device(options.device)
    preset = TINY if options.tiny else FULL
    given = {name: value for name in ("steps", "rate") if (value := getattr(options, name)) is not None}
    if any(value <= 0 for value in given.values()):
        raise ValueError(f"--steps and --rate are above 0, got {given}")
    which = "dense" if options.command == "dense" else "tune"
    preset = dataclasses.replace(preset, **{which: dataclasses.replace(getattr(preset, which), **given)})
    out = results.ROOT / "out" / "experiment"
    own = out / "tiny" if options.tiny else out
    return Place(
        device=device,
        preset=preset,
        base=options.base or (own / "dense.safetensors" if options.tiny else ASSETS / "dense.safetensors"),
        tuned=options.tuned or own,
        kept=own,
        rows=options.results or (own / "rows.jsonl" if options.tiny else results.default_path(device)),
        compiled=not options.no_compile and not options.tiny,
    )


def main(given: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = _arguments(given)
    try:
        place = _place(options)
        if options.command == "dense":
            pretrain(place)
        elif options.command == "arm":
            run_arm(arm_named(options.name), [options.seed], place)
        elif options.command == "all":
            return 1 if run_all(options.arms, options.seeds, place) else 0
        else:
            evidence.write()
    except (UnknownArmError, FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
