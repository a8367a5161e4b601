"""The nodes against ComfyUI itself, on the CPU, with a small Wan of random weights: minutes, nothing is downloaded.

    python examples/comfyui_salad/check.py PATH_OF_COMFYUI

What the nodes' MODEL computes is compared with what diffusers' Wan computes from the same weights and the same SALAD
file. Needs what ComfyUI needs, and diffusers.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import salad_compile
from salad_compile.exchange import to_original_names
from salad_compile.sites.branch import branches

FOLDER = Path(__file__).resolve().parent
WIDTH, TOLERANCE = 256, 1e-4
CONFIG = salad_compile.SaladConfig(
    sparsity=0.7, lowest_sparsity=0.3, query_block=16, key_block=16, lora_rank=4, min_tokens=1
)
KEY = "blocks.1.self_attn.v.weight"


def import_nodes(folder: Path = FOLDER) -> ModuleType:
    """The package as ComfyUI imports it: by its path."""
    spec = importlib.util.spec_from_file_location("comfyui_salad", folder / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def import_comfyui(path: Path) -> None:
    if not (path / "comfy" / "model_patcher.py").is_file():
        raise SystemExit(f"{path} is not a checkout of ComfyUI: it has no comfy/model_patcher.py.")
    sys.path.insert(0, str(path))
    sys.argv[1:] = ["--cpu", "--use-pytorch-cross-attention"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.sample
    import comfy.sd


def make_wan(**changes: Any) -> Any:
    """diffusers' class. changes: of its configuration."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=WIDTH // 128,
        attention_head_dim=128,
        text_dim=4096,
        ffn_dim=2 * WIDTH,
        num_layers=2,
        **changes,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.7 * parameter[0].numel() ** -0.5)
    return model.eval()


def convert(model: nn.Module) -> nn.Module:
    salad_compile.convert(model, CONFIG)
    with torch.no_grad():
        for branch in branches(model).values():
            for parameter in branch.parameters():
                parameter.normal_(0, 0.05)
    return model


class Inputs:
    """Of one forward. image: what the image encoder says of a first frame, or None."""

    def __init__(self, channels: int = 16, image: Tensor | None = None) -> None:
        # as many tokens of text as the pipelines have: diffusers finds those of the image by it
        self.video, self.text = torch.randn(1, channels, 3, 16, 24), torch.randn(1, 512, 4096)
        self.time, self.image = torch.tensor([500.0]), image

    @torch.inference_mode()
    def of_diffusers(self, model: Any) -> Tensor:
        image = {} if self.image is None else {"encoder_hidden_states_image": self.image}
        return model(hidden_states=self.video, timestep=self.time, encoder_hidden_states=self.text, **image).sample

    @torch.inference_mode()
    def of_comfyui(self, patcher: Any, memory: int = 0) -> Tensor:
        """memory: of the device, in bytes; 0 for as much as is wanted."""
        import comfy.model_management

        if memory:
            patcher.detach()
            patcher.patch_model(patcher.load_device, lowvram_model_memory=memory)
        else:
            comfy.model_management.load_models_gpu([patcher])
        options = dict(patcher.model_options["transformer_options"])
        model = patcher.model.diffusion_model
        return model(self.video, self.time, context=self.text, clip_fea=self.image, transformer_options=options)


def difference(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def say(what: str, error: float, *, same: bool = True) -> None:
    if (error < TOLERANCE) is not same:
        raise SystemExit(f"FAILED: {what}: relative difference {error:.2e}")
    print(f"ok: {what} ({error:.1e})", flush=True)


def load_comfyui_model(weights: dict[str, Tensor], **options: Any) -> Any:
    import comfy.sd

    with torch.inference_mode():  # as in a node
        return comfy.sd.load_diffusion_model_state_dict(dict(weights), model_options=options)


def run_node(node: type, *inputs: Any) -> Any:
    with torch.inference_mode():
        return getattr(node(), node.FUNCTION)(*inputs)[0]


def check_models(nodes: dict[str, type], folder: Path) -> tuple[Any, Any]:
    """Loaded, steered and compiled; returns the MODEL and the SALAD one."""
    inputs, wan = Inputs(), make_wan()
    weights = {name: tensor.clone() for name, tensor in to_original_names(wan.state_dict()).items()}
    dense = inputs.of_diffusers(wan)
    file = salad_compile.save(convert(wan), folder / "salad.safetensors")
    expected = inputs.of_diffusers(wan)
    base = load_comfyui_model(weights)
    say("ComfyUI's Wan computes what diffusers' does", difference(inputs.of_comfyui(base), dense))
    model = run_node(nodes["LoadSalad"], base, str(file))
    say("Load SALAD", difference(inputs.of_comfyui(model), expected))
    say("... and that is not the dense model", difference(expected, dense), same=False)
    say("the MODEL it was made from stays as it was", difference(inputs.of_comfyui(base), dense))
    say("with little memory", difference(inputs.of_comfyui(model, 1), expected))
    model.detach()
    salad_compile.set_sparsity(wan, 0.4)
    steered = run_node(nodes["SaladSettings"], model, 0.4, 0, False)
    say("SALAD settings: sparsity", difference(inputs.of_comfyui(steered), inputs.of_diffusers(wan)))
    say("... of that clone alone", difference(inputs.of_comfyui(model), expected))
    with salad_compile.dense(wan):
        held = inputs.of_diffusers(wan)
    steered = run_node(nodes["SaladSettings"], model, 0.0, 0, True)
    say("SALAD settings: dense", difference(inputs.of_comfyui(steered), held))
    compiled = run_node(nodes["CompileWithSalad"], model, "eager")
    say("Compile with SALAD", difference(inputs.of_comfyui(compiled), expected))
    check_lora(nodes["LoadSalad"], base, file, wan, inputs)
    check_fp8(nodes["LoadSalad"], file, weights, inputs)
    check_exported(base, wan, inputs, folder)
    check_image_to_video(nodes["LoadSalad"], folder)
    return base, compiled


def check_lora(node: type, base: Any, file: Path, wan: Any, inputs: Inputs) -> None:
    update = 0.05 * torch.randn(WIDTH, WIDTH)

    def patch(model: Any) -> Any:
        changed = model.clone()
        assert changed.add_patches({f"diffusion_model.{KEY}": ("diff", (update,))})
        return changed

    salad_compile.set_sparsity(wan, CONFIG.sparsity)
    weight = wan.blocks[1].attn1.to_v.weight
    plain = inputs.of_diffusers(wan)
    with torch.no_grad():
        weight += update
        expected = inputs.of_diffusers(wan)
        weight -= update
    first = patch(base)
    inputs.of_comfyui(first)  # in use while the node runs
    before = run_node(node, first, str(file))
    say("a LoRA before Load SALAD", difference(inputs.of_comfyui(before), expected))
    after = patch(run_node(node, base, str(file)))
    say("a LoRA after it", difference(inputs.of_comfyui(after), expected))
    say("... and with little memory", difference(inputs.of_comfyui(after, 1), expected))
    after.detach()
    say("and without it again", difference(inputs.of_comfyui(run_node(node, base, str(file))), plain))


def check_fp8(node: type, file: Path, weights: dict[str, Tensor], inputs: Inputs) -> None:
    rounded = {k: v.to(torch.float8_e4m3fn).to(v.dtype) for k, v in weights.items()}
    wide = run_node(node, load_comfyui_model(rounded), str(file))
    narrow = load_comfyui_model(rounded, dtype=torch.float8_e4m3fn)
    assert narrow.model.diffusion_model.blocks[0].self_attn.q.weight.dtype == torch.float8_e4m3fn
    narrow = run_node(node, narrow, str(file))
    say("weights in fp8", difference(inputs.of_comfyui(narrow), inputs.of_comfyui(wide)))


def check_exported(base: Any, wan: Any, inputs: Inputs, folder: Path) -> None:
    """The LoRA alone, through ComfyUI's loader: dense attention with the low-rank updates."""
    import comfy.sd
    import comfy.utils

    salad_compile.export(wan, folder / "exported", formats=["comfyui"])
    weights = comfy.utils.load_torch_file(str(folder / "exported" / "lora" / "comfyui_lora.safetensors"))
    with torch.inference_mode():
        model, _ = comfy.sd.load_lora_for_models(base, None, weights, 1.0, 0.0)
    with salad_compile.dense(wan):
        expected = inputs.of_diffusers(wan)
    say("the exported LoRA is the dense model with its updates", difference(inputs.of_comfyui(model), expected))


def check_image_to_video(node: type, folder: Path) -> None:
    inputs = Inputs(36, torch.randn(1, 257, 1280))
    wan = make_wan(in_channels=36, out_channels=16, image_dim=1280, added_kv_proj_dim=WIDTH)
    base = load_comfyui_model({name: tensor.clone() for name, tensor in to_original_names(wan.state_dict()).items()})
    dense = inputs.of_diffusers(wan)
    say("image-to-video, dense", difference(inputs.of_comfyui(base), dense))
    convert(wan)
    file = salad_compile.save(wan, folder / "image.safetensors")
    expected = inputs.of_diffusers(wan)
    say("image-to-video", difference(inputs.of_comfyui(run_node(node, base, str(file))), expected))
    say("... and that is not the dense model", difference(expected, dense), same=False)


def check_sampler(nodes: dict[str, type], base: Any, model: Any) -> None:
    """Three steps of ComfyUI's own sampler."""
    import comfy.sample

    @torch.inference_mode()
    def sample(patcher: Any) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        noise = torch.randn(1, 16, 3, 16, 24, generator=generator)
        texts = [[[torch.randn(1, 20, 4096, generator=generator), {}]] for _ in range(2)]
        return comfy.sample.sample(
            patcher, noise, 3, 4.0, "euler", "simple", *texts, torch.zeros_like(noise), seed=1, disable_pbar=True
        )

    def steered(steps: int) -> Any:
        return run_node(nodes["SaladSettings"], model, 0.0, steps, False)

    salad, first, all_steps = sample(model), sample(steered(1)), sample(steered(3))
    dense = sample(run_node(nodes["SaladSettings"], model, 0.0, 0, True))
    say("a sampler with three dense steps of three", difference(all_steps, dense))
    say("with one", difference(first, dense), same=False)
    say("with none", difference(first, salad), same=False)
    say("and the MODEL without SALAD", difference(sample(base), salad), same=False)


def main(arguments: list[str], report: Callable[[str], None] = print) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="a checkout of ComfyUI")
    path = parser.parse_args(arguments).path
    import_comfyui(path.resolve())
    nodes = import_nodes().NODE_CLASS_MAPPINGS
    with tempfile.TemporaryDirectory() as folder:
        base, model = check_models(nodes, Path(folder))
        check_sampler(nodes, base, model)
    report("all of it works")


if __name__ == "__main__":
    main(sys.argv[1:])
