"""What the recipes share: a tiny Wan of 154 tokens and two blocks, a batch, a loss, and a pipeline around it."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import salad_compile
from tests.models.zoo import CASES, TEXT
from tests.support import TINY as CONFIG
from tests.support import randomise_branches, seeded

CASE = CASES["Wan"]
INPUTS = CASE.inputs(0)
STYLE = {"r": 2, "lora_alpha": 4, "target_modules": ["to_q", "to_v", "to_out.0"], "init_lora_weights": False}


def base() -> Any:
    """Always the same weights; eval mode."""
    return CASE.build()


def converted(seed: int = 0) -> Any:
    """A converted model whose branches contribute, as after fine-tuning."""
    model = copy.deepcopy(_converted())
    randomise_branches(model, seed)
    return model


@functools.cache
def _converted() -> Any:
    return salad_compile.convert(base(), CONFIG, example_inputs=dict(INPUTS))


def output(model: Any) -> Tensor:
    """One forward, without gradients."""
    with torch.no_grad():
        out: Tensor = model(**INPUTS, return_dict=False)[0]
    return out


def batch(size: int = 2) -> dict[str, Tensor]:
    """Clean latents, noise, noise levels and text of so many videos; the first ones are the same whatever the size."""
    draw = torch.Generator().manual_seed(5)
    return {
        "latents": torch.randn(size, *INPUTS["hidden_states"].shape[1:], generator=draw),
        "noise": torch.randn(size, *INPUTS["hidden_states"].shape[1:], generator=draw),
        "sigma": torch.linspace(0.3, 0.8, size),
        "text": torch.randn(size, TEXT, 16, generator=draw),
    }


def flow_matching_loss(model: Any, latents: Tensor, noise: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
    """x_s = (1 - s) x_0 + s e; the model predicts e - x_0 (ecosystem: Wan and its trainers)."""
    s = sigma.view(-1, 1, 1, 1, 1)
    predicted = model(
        hidden_states=(1 - s) * latents + s * noise,
        timestep=1000 * sigma,
        encoder_hidden_states=text,
        return_dict=False,
    )[0]
    return F.mse_loss(predicted.float(), noise - latents)


def branch_gradients(model: Any) -> dict[str, Tensor]:
    """Plain name -> gradient of every parameter of a branch."""
    found = {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if ".salad." in name}
    assert found
    assert all(gradient is not None for gradient in found.values()), "a parameter of a branch has no gradient"
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def pipeline(transformer: Any, transformer_2: Any = None, **settings: Any) -> Any:
    """A WanPipeline without text encoder and VAE, which needs no files: give it prompt_embeds, output_type="latent"."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=transformer,
        transformer_2=transformer_2,
        **settings,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: Any, steps: int = 2, **more: Any) -> Tensor:
    """Latents of a video of 154 tokens."""
    latents = INPUTS["hidden_states"]
    out: Tensor = pipe(
        prompt_embeds=INPUTS["encoder_hidden_states"],
        latents=latents,
        height=8 * latents.shape[3],
        width=8 * latents.shape[4],
        num_frames=1 + 4 * (latents.shape[2] - 1),
        num_inference_steps=steps,
        guidance_scale=1.0,
        output_type="latent",
        return_dict=False,
        **more,
    )[0]
    return out


def write_style(directory: Path, seed: int) -> Path:
    """A LoRA of somebody else's for this base, as diffusers writes it."""
    from diffusers import WanPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    with seeded(seed):
        model = base()
        model.add_adapter(LoraConfig(**STYLE))
    layers = get_peft_model_state_dict(model)
    WanPipeline.save_lora_weights(directory, transformer_lora_layers=layers)
    return directory
