"""Restore a noisy held-out clip with the dense model, with untrained sparse attention and with fine-tuned SALAD.

    python examples/experiment/sample.py                    out/experiment/sample.png; under a minute on two cores
    python examples/experiment/sample.py --publish          the README's strip and its seconds; on a quiet machine
    python examples/experiment/sample.py --level 1 --steps 30      from pure noise: samples, no clip to compare with
    python examples/experiment/sample.py --look out/look           draws what SALAD attends to: masks, recall, gates

The weights are those in assets/: `dense.safetensors` by `run.py dense`, `salad.safetensors` by the arm
"tail-error-16-taught", seed 0, whose row in benchmarks/results/ says command, commit and device.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F

matplotlib.use("Agg")

from arms import arm_named, build
from flow import HELD_OUT_SEED, psnr, sample
from matplotlib import pyplot
from model import VideoDiT
from presets import FULL
from results import RESULTS, ROOT
from run import ASSETS, load_dense
from torch import Tensor, nn
from videos import draw

import salad_compile
from salad_compile.common.progress import ProgressBar

FRAMES_SHOWN = 8
CPU = torch.device("cpu")
PUBLISHED = {
    "rounds": 3,
    "json": RESULTS / "sample_cpu.json",
    "output": ROOT / "docs" / "pictures" / "experiment.png",
}
PAGES = (ROOT / "README.md", ROOT / "docs" / "index.md")
SECONDS_IN_TEXT = (
    r"with dense\s+attention\s+\(([\d.]+) s\);\s+with\s+90 %\s+of\s+it\s+left\s+out\s+\(([\d.]+) s\);\s+and\s+"
    r"fine-tuned\s+as\s+SALAD\s+\(arXiv\s+2601\.16515,\s+([\d.]+) s\)"
)


def models() -> dict[str, nn.Module]:
    """Title -> model: dense, sparse without training, and SALAD from its file."""

    def base() -> VideoDiT:
        return load_dense(ASSETS / "dense.safetensors", FULL, CPU)

    return {
        "dense": base(),
        "90 % sparse, untrained": build(arm_named("sparse-only"), base(), FULL, CPU, seed=0),
        "90 % sparse, SALAD": salad_compile.load(base(), ASSETS / "salad.safetensors"),
    }


def draw_strip(clips: dict[str, Tensor], path: Path) -> None:
    """One row of frames for each clip, fp32 (1, 3, T, S, S), and beside it a quarter of its last frame, enlarged."""
    first = next(iter(clips.values()))
    count, crop = min(FRAMES_SHOWN, first.shape[2]), first.shape[-1] // 2
    sizes = {"width_ratios": [count, 1.05], "wspace": 0.03, "hspace": 0.28}
    figure, axes = pyplot.subplots(
        len(clips), 2, figsize=(count + 1.2, 1.22 * len(clips)), squeeze=False, gridspec_kw=sizes
    )
    for (title, clip), (strip, detail) in zip(clips.items(), axes, strict=True):
        chosen = torch.linspace(0, clip.shape[2] - 1, count).round().long()
        shown = (clip[0].clamp(-1, 1) + 1) / 2
        frames = F.pad(shown[:, chosen], (1, 1), value=1.0)  # (3, frames, S, S + 2)
        strip.imshow(frames.permute(2, 1, 3, 0).flatten(1, 2).numpy(), interpolation="nearest")
        strip.set_title(title, fontsize=9, loc="left", pad=3)
        # below the bar, where sprites meet the background: chosen once, not for what a model does there
        detail.imshow(shown[:, -1, -crop:, -crop:].permute(1, 2, 0).numpy(), interpolation="nearest")
        for axis in (strip, detail):
            axis.axis("off")
    axes[0, 1].set_title("last frame, corner", fontsize=7, loc="left", pad=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, bbox_inches="tight", pad_inches=0.05, pil_kwargs={"optimize": True})
    pyplot.close(figure)


def restore(
    given: dict[str, nn.Module], noised: Tensor, labels: Tensor, options: argparse.Namespace
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What each model makes of the noise, and in how many CPU seconds: the fastest of rounds in turn."""
    restored: dict[str, Tensor] = {}
    taken: dict[str, list[float]] = {title: [] for title in given}
    with ProgressBar("restoring", len(given) * (options.rounds * options.steps + 1)) as bar:
        for title, model in given.items():  # what a first call allocates and compiles is not timed
            bar.advance(0, note=title)
            sample(model, noised, labels, 1, options.level, bar.advance)
        for _ in range(options.rounds):
            for title, model in given.items():
                bar.advance(0, note=title)
                start = time.process_time()
                restored[title] = sample(model, noised, labels, options.steps, options.level, bar.advance)
                taken[title].append(time.process_time() - start)
    return restored, {title: min(each) for title, each in taken.items()}


def write_seconds(options: argparse.Namespace, seconds: dict[str, float]) -> None:
    """The row that the README's strip is held against (tests/docs/test_numbers.py)."""
    asked = "--publish" if options.publish else f"--rounds {options.rounds} --json {options.json}"
    row = {
        "command": f"python examples/experiment/sample.py {asked}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "steps": options.steps,
        "level": options.level,
        "rounds": options.rounds,
        "cpu_seconds": {title: round(value, 2) for title, value in seconds.items()},
    }
    options.json.write_text(json.dumps(row, indent=1) + "\n")


def with_seconds(text: str, seconds: Sequence[float]) -> str:
    """The text of a page, with these seconds in its sentence about the strip.

    Raises:
        ValueError: it has no such sentence, or more than one.
    """
    found = list(re.finditer(SECONDS_IN_TEXT, text))
    if len(found) != 1:
        raise ValueError(f"the sentence with the seconds of the strip is there {len(found)} times")
    for group, value in reversed(list(enumerate(seconds, start=1))):
        start, end = found[0].span(group)
        text = f"{text[:start]}{value:.1f}{text[end:]}"
    return text


def main(given: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clip", type=int, default=5, help="number of the held-out clip")
    parser.add_argument("--level", type=float, default=0.6, help="noise level to begin with, 1 is pure noise")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=1, help="of which the fastest is told")
    parser.add_argument("--json", type=Path, help="write the seconds here")
    parser.add_argument("--output", type=Path, default=ROOT / "out" / "experiment" / "sample.png")
    parser.add_argument("--look", type=Path, help="write block masks, recall and gates of SALAD into this folder")
    parser.add_argument("--publish", action="store_true", help="measure and write what the README shows")
    options = parser.parse_args(given)
    if options.publish:
        vars(options).update(PUBLISHED)
    torch.set_num_threads(1)  # CPU seconds of several would count those in which one waits for another
    size = FULL.model.clip
    clip = draw(HELD_OUT_SEED, torch.tensor([options.clip]), size)
    noise = torch.randn(clip.video.shape, generator=torch.Generator().manual_seed(options.clip))
    noised = clip.video + options.level * (noise - clip.video)
    if options.look:
        seen = {"hidden_states": noised, "timestep": torch.tensor([options.level]), "label": clip.labels}
        print(f"wrote {salad_compile.save_pictures(models()['90 % sparse, SALAD'], seen, options.look)}")
        return 0
    compared = {"clip": clip.video} if options.level < 1 else {}  # pure noise has no original
    rows = {**compared, f"what the models are given: noise level {options.level:g}": noised}
    print(f"held-out clip {options.clip}, noise level {options.level:g}, {options.steps} Euler steps", flush=True)
    restored, seconds = restore(models(), noised, clip.labels, options)
    for title, video in restored.items():
        alike = [f"{psnr(video, other):.1f} dB to {name}" for name, other in compared.items()]
        alike.append(f"{seconds[title]:.1f} CPU s")
        print(f"{title}: {', '.join(alike)}", flush=True)
        rows[f"{title}: {', '.join(alike)}"] = video
        if title == "dense":
            compared["dense"] = video
    draw_strip(rows, options.output)
    print(f"wrote {options.output}")
    if options.json:
        write_seconds(options, seconds)
    if options.publish:
        told = list(json.loads(options.json.read_text())["cpu_seconds"].values())
        for page in PAGES:
            page.write_text(with_seconds(page.read_text(encoding="utf-8"), told), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
