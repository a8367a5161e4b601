"""Fine-tune a Wan-style model for SALAD on precomputed latents, and export it.

    accelerate launch examples/finetune.py --model Wan2.1-T2V-1.3B-Diffusers/transformer --latents data --output run

`accelerate launch` chooses between one process, DDP and FSDP2 (`accelerate config`, or `--use_fsdp --fsdp_version 2`).
After Ctrl-C, SIGTERM or a kill, the same command continues exactly from the newest checkpoint. `salad-compile latents`
inspects and converts data of other trainers; `salad-compile train` is this script as a command. Copy the script if you
need another loop: everything used here is public.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel

import salad_compile
from salad_compile.latents import open_latents
from salad_compile.training import TrainSettings, train


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory of the transformer, as save_pretrained writes it")
    parser.add_argument("--latents", required=True, help="FastVideo parquet, musubi-tuner caches, or our own format")
    parser.add_argument("--validation", help="held-out latents")
    parser.add_argument("--output", required=True, help="directory of the run")
    parser.add_argument("--settings", help="JSON file of TrainSettings")
    parser.add_argument("--conversion", help="JSON file of SaladConfig")
    parser.add_argument("--steps", type=int)
    return parser.parse_args()


def settings_of(arguments: argparse.Namespace) -> TrainSettings:
    """The paper's recipe by default: 1,600 steps of 8 samples at 90 % sparsity; the rest is our choice."""
    settings = TrainSettings.from_file(arguments.settings) if arguments.settings else TrainSettings()
    return settings if arguments.steps is None else settings.with_changes({"steps": arguments.steps})


def main() -> None:
    arguments = parse()
    first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if first else logging.WARNING, format="%(levelname)s %(message)s")
    settings = settings_of(arguments)
    values = json.loads(Path(arguments.conversion).read_text()) if arguments.conversion else {}
    config = salad_compile.SaladConfig.from_dict(values)

    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    model = WanTransformer3DModel.from_pretrained(arguments.model, torch_dtype=dtype)
    latents = open_latents(arguments.latents)
    validation = open_latents(arguments.validation) if arguments.validation else None

    # Converts the model for the largest latent of the data. Alternatively, call model = salad_compile.convert(model,
    # config, example_inputs=...) here and omit config= below; salad_compile.plan(model, ...) lists the sites.
    result = train(model, latents, settings, arguments.output, validation=validation, config=config)
    if not result.finished:
        print(f"stopped after step {result.step} of {settings.steps}: the same command continues")
        return

    # Every process calls export: FSDP2 gathers the shards.
    summary = json.loads((Path(arguments.output) / "training.json").read_text())
    report = salad_compile.export(model, Path(arguments.output) / "export", training=summary)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if first:
        print(report)


if __name__ == "__main__":
    main()
