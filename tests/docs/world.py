"""The world in which the snippets of the documents run: tiny files and models under the names they use, small defaults.

Snippets are written for users. The checkpoints, data and models that they name exist in a directory of the test, a
thousand times smaller. Only defaults are changed (:func:`small_defaults`), and steps that would take minutes without
testing more: graphs are rewritten and run, but not compiled by Inductor
(`tests/salad_compile/backend/test_exported_programs.py` and `tests/models` do that).
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import salad_compile
from salad_compile.command_line import latents_encode
from salad_compile.config import BackendOptions
from salad_compile.latents import WAN_2_1, LatentItem, convert_latents, write_latents
from salad_compile.training import TrainSettings
from tests.models.zoo import CASES, from_diffusers, randomise
from tests.salad_compile.latents.encoding import world as encoders
from tests.support import TINY, randomise_branches, seeded
from tests.trainers import tiny

LATENT = (16, 2, 14, 22)  # 154 tokens
TEXT_TOKENS, TEXT_WIDTH = 17, 16
WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": TEXT_WIDTH,
    "freq_dim": 32,
    "ffn_dim": 48,
    "num_layers": 1,
    "rope_max_seq_len": 64,  # 480p has 60 x 104 latents
}
CALL = {
    "height": 8 * LATENT[2],
    "width": 8 * LATENT[3],
    "num_frames": 1 + 4 * (LATENT[1] - 1),
    "num_inference_steps": 3,
    "guidance_scale": 1.0,
}

# Defaults that are smaller here than for users; snippets that set a value keep it.
CONVERSION = {"compensation": "none", "query_block": 32, "key_block": 16, "lora_rank": 3, "min_tokens": 90}
BACKEND = {"query_block": 32, "key_block": 16, "min_tokens": 90, "lowering": "eager"}
TRAINING = {
    "steps": 2,
    "batch": 2,
    "warmup_steps": 1,
    "text_tokens": TEXT_TOKENS,
    "precision": "fp32",
    "compile": "none",
    "gradient_checkpointing": False,
    "checkpoint_every": 1,
    "validation_points": 1,
    "workers": 0,
}


def base(seed: int = 0, **changes: Any) -> Any:
    """A Wan of one block, always with the same weights."""
    return copy.deepcopy(_base(seed)) if not changes else _build_wan(seed, changes)


@functools.cache
def _base(seed: int) -> Any:
    return _build_wan(seed, {})


def _build_wan(seed: int, changes: dict[str, Any]) -> Any:
    with seeded(seed):
        return randomise(from_diffusers("WanTransformer3DModel", WAN | changes), seed).eval()


def inputs() -> dict[str, Tensor]:
    """Inputs of one forward."""
    draw = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(1, *LATENT, generator=draw),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, TEXT_TOKENS, TEXT_WIDTH, generator=draw),
    }


def convert_base(**changes: Any) -> Any:
    """A converted model in which every part of the branches contributes, as after fine-tuning."""
    return fine_tune(base(), **changes)


def fine_tune(model: Any, **changes: Any) -> Any:
    """Convert a model, and let its branches contribute."""
    model = salad_compile.convert(model, dataclasses.replace(TINY, **changes), example_inputs=inputs())
    randomise_branches(model)
    return model


def whole_pipeline() -> Any:
    """With a VAE and a text encoder, which have random weights."""
    from diffusers import WanPipeline

    parts = encoders.wan().components
    return WanPipeline(**{**parts, "transformer": base(), "scheduler": pipeline(base()).scheduler})


def pipeline(transformer: Any, transformer_2: Any = None) -> Any:
    """A pipeline without text encoder and VAE; :func:`small_defaults` lets it take a prompt."""
    return tiny.pipeline(transformer, transformer_2, boundary_ratio=None if transformer_2 is None else 0.5)


# --- files ------------------------------------------------------------------------------------------------------------


def build(directory: Path) -> None:
    """Write the files that snippets find in their working directory."""
    whole_pipeline().save_pretrained(directory / "Wan2.1-T2V-1.3B-Diffusers")
    encoders.write_clips(directory / "clips", [f"clip{number}.mp4" for number in range(5)])
    pipeline(base(), base(1)).save_pretrained(directory / "Wan2.2-T2V-A14B-Diffusers")
    write_latents(_clips(8, "clip"), directory / "data", statistics=WAN_2_1)
    write_latents(_clips(2, "held-out"), directory / "held_out", statistics=WAN_2_1)
    for name in ("musubi", "fastvideo"):
        convert_latents(directory / "data", directory / f"{name}_data", to=name, progress=False)
    _damaged(directory / "damaged_data")
    _style(directory / "style")
    salad_compile.save(convert_base(), directory / "run" / "salad.safetensors")
    (directory / "step.py").write_text("from tests.docs.world import inputs\n")


def _clips(count: int, name: str) -> list[LatentItem]:
    draw = torch.Generator().manual_seed(count)
    return [
        LatentItem(
            f"{name}-{number}",
            torch.randn(LATENT, generator=draw),
            torch.randn(5 + number % 4, TEXT_WIDTH, generator=draw),
            "a caption",
            16.0,
        )
        for number in range(count)
    ]


def _damaged(directory: Path) -> None:
    """Write two items and cut one short."""
    write_latents(_clips(2, "clip"), directory)
    file = directory / "items" / "clip-0.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _style(directory: Path) -> None:
    """Write a LoRA that is not ours, as diffusers does."""
    from diffusers import WanPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    model = base()
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    WanPipeline.save_lora_weights(directory, transformer_lora_layers=get_peft_model_state_dict(model))


# --- names ------------------------------------------------------------------------------------------------------------


def names() -> dict[str, Any]:
    """Names that the python blocks of a page may use; blocks of one page share these and the names that they make.

    `model`, `base_model`: a Wan that was never converted. `pipe`: a pipeline with a fine-tuned transformer. `inputs`:
    of one forward. `latents`, `timestep`, `text`: the same one by one.
    """
    given = inputs()
    return {
        "__name__": "snippets",
        "torch": torch,
        "model": base(),
        "base_model": base(),
        "pipe": pipeline(convert_base()),
        "prompt": "a cat walks on grass",
        "inputs": given,
        "latents": given["hidden_states"],
        "timestep": given["timestep"],
        "text": given["encoder_hidden_states"],
        "step": 100,
    }


# docs/settings.md has alternatives one after the other. A fragment of a block -> names that are made afresh for it.
FRESH: dict[str, Callable[[], dict[str, Any]]] = {
    "salad_compile.plan(model)": lambda: {"model": base()},
    "salad_compile.set_sparsity(model, 0.8)": lambda: {"model": convert_base(sparsity=0.9, lowest_sparsity=0.5)},
    '"x": latents': lambda: handwritten(),
    "attention_adapter(torch.ops.my_ops": lambda: my_operators(),
    "salad_compile.diagnose(model, inputs)": lambda: {
        "model": fine_tune(base(num_layers=2), overrides={"blocks.1.*": {"pattern": "stswa"}}),
        "inputs": inputs(),
    },
}


def handwritten() -> dict[str, Any]:
    """A hand-written model, called with x, t and text."""
    case = CASES["handwritten_inline"]
    given = case.inputs(0)
    return {"model": case.build(), "latents": given["x"], "timestep": given["t"], "text": given["text"]}


def my_operators() -> dict[str, Any]:
    """torch.ops.my_ops.varlen_attention, the operator that docs/settings.md adapts."""
    if hasattr(torch.ops.my_ops, "varlen_attention"):
        return {}

    @torch.library.custom_op("my_ops::varlen_attention", mutates_args=())
    def varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*(tensor.transpose(0, 1) for tensor in (q, k, v))).transpose(0, 1).clone()

    return {}


class Hub:
    """Stands in for the Hugging Face Hub."""

    def __init__(self, token: str | None = None) -> None:
        self.repositories: set[str] = set()

    def create_repo(self, repo_id: str, **options: Any) -> None:
        self.repositories.add(repo_id)

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> Any:
        assert repo_id in self.repositories
        assert (Path(folder_path) / "salad.safetensors").is_file()
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo_id}/commit/1")


# What a page makes by itself, and is not there before.
MADE = {"getting_started": ("data", "run"), "fine_tuning": ("data", "run")}

# --- defaults ---------------------------------------------------------------------------------------------------------


def small_defaults(patch: pytest.MonkeyPatch) -> None:
    """Change what differs from a user's environment; nothing else does."""
    for cls, changes in ((salad_compile.SaladConfig, CONVERSION), (BackendOptions, BACKEND), (TrainSettings, TRAINING)):
        fields = [field.name for field in dataclasses.fields(cls) if field.init]
        made = inspect.unwrap(cls.__init__)
        patched = dict(zip(fields, made.__defaults__, strict=True)) | changes
        assert patched.keys() == set(fields), "a default that is changed here has another name now"
        patch.setattr(made, "__defaults__", tuple(patched.values()))
    _small_pipelines(patch)
    _without_inductor(patch)
    patch.setattr("huggingface_hub.HfApi", Hub)


def _small_pipelines(patch: pytest.MonkeyPatch) -> None:
    """Sizes of video that take no time; pipelines without text encoder and VAE get a text, and make latents."""
    from diffusers import WanPipeline

    call, from_pretrained = WanPipeline.__call__, WanPipeline.from_pretrained
    encode = WanPipeline.encode_prompt
    patch.setattr(latents_encode, "DEFAULT_PIXELS", (CALL["num_frames"], CALL["height"], CALL["width"]))

    def small_from_pretrained(path: Any, **named: Any) -> Any:
        bare = {} if (Path(path) / "vae").is_dir() else {"vae": None, "text_encoder": None, "tokenizer": None}
        return from_pretrained(path, **named, **bare)

    def small_call(pipe: Any, prompt: Any = None, **given: Any) -> Any:
        output = {} if pipe.vae is not None else {"output_type": "latent"}
        return call(pipe, prompt=prompt, **{**given, **CALL, **output})

    def encode_prompt(pipe: Any, *given: Any, **named: Any) -> Any:
        if pipe.text_encoder is not None:
            return encode(pipe, *given, **named)
        return inputs()["encoder_hidden_states"].to(pipe.transformer.dtype), None

    patch.setattr(WanPipeline, "from_pretrained", small_from_pretrained)
    patch.setattr(WanPipeline, "__call__", small_call)
    patch.setattr(WanPipeline, "encode_prompt", encode_prompt)


def _without_inductor(patch: pytest.MonkeyPatch) -> None:
    """Packages of AOTInductor hold the program itself."""

    def package(program: Any, *, package_path: str, inductor_configs: Any = None) -> str:
        torch.export.save(program, package_path)
        return package_path

    patch.setattr(torch._inductor, "aoti_compile_and_package", package)
    patch.setattr(torch._inductor, "aoti_load_package", lambda path: torch.export.load(path).module())
