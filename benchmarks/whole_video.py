"""Whether `salad-compile bench --video-steps`, which times one and four blocks, tells the time of the whole model.

    python benchmarks/whole_video.py                  # Wan2.1-1.3B at 480p, 81 frames: about two minutes on an H200
    python benchmarks/whole_video.py --quick          # a tiny model on whatever there is: checks that it runs

One forward dense and as SALAD, and one sample of a fine-tuning, each of the whole model and scaled from its blocks.
Rows go to results/whole_video_<gpu>.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from common import Facts, Results, default_output, describe

from salad_compile.command_line import bench, build_parser
from salad_compile.command_line.training_cost import SampleCost, measure_sample
from salad_compile.command_line.whole_video import time_video

WAN = {"_class_name": "WanTransformer3DModel", "num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960}
QUICK_WAN = {**WAN, "num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 3, "ffn_dim": 32, "text_dim": 16}
SIZE = ("--height", "480", "--width", "832", "--frames", "81", "--dtype", "bfloat16")
QUICK_SIZE = ("--latent", "3x16x16", "--text-tokens", "8", "--min-tokens", "16", "--dtype", "float32")
QUICK_RUN = ("--compile", "none", "--device", "cpu")


def measure(options: argparse.Namespace, folder: Path) -> dict[str, tuple[float, float]]:
    """Milliseconds, scaled and of the whole model, by what was timed."""
    file = folder / "config.json"
    file.write_text(json.dumps(QUICK_WAN if options.quick else WAN))
    size = (*QUICK_SIZE, *QUICK_RUN) if options.quick else SIZE
    words = [str(file), *size, "--random", "--rounds", str(options.rounds)]
    parser = build_parser("bench")
    whole, scaled = (parser.parse_args(["bench", *words, *more]) for more in ((), ("--video-steps", "50")))

    def sample(arguments: argparse.Namespace) -> SampleCost:
        return measure_sample(arguments, bench._make_pair, bench._compile)

    video = time_video(scaled, bench._measure, sample)
    print("scaled from one and four blocks\n" + video.to_text(), flush=True)
    assert video.sample is not None
    report = bench._measure(whole)
    print("the whole model\n" + report.to_text(), flush=True)
    return {
        "dense": (video.forward_ms["dense"], report.dense.median),
        "SALAD": (video.forward_ms["SALAD"], report.salad.median),
        "training": (video.sample.milliseconds, sample(whole).milliseconds),
    }


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark, print the rows, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="a tiny model")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = {**describe(device), "quick": options.quick, "rounds": options.rounds}
    results = Results(options.output or default_output("whole_video", device), facts)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options, Path(folder))
    rows: list[Facts] = []
    for name, (scaled, whole) in found.items():
        rows.append({"row": name, "scaled_ms": scaled, "whole_ms": whole, "off": scaled / whole - 1})
        print(
            f"{name:10s} scaled {scaled:10.2f} ms, whole {whole:10.2f} ms, off by {100 * (scaled / whole - 1):+.1f} %"
        )
    results.add(rows)


if __name__ == "__main__":
    main()
