"""Tiny video DiTs for the tests: diffusers classes and hand-written ones, every weight re-randomised.

Models are built on the CPU in fp32 and eval mode. Building one, or making its inputs, leaves the global random state
alone, and the same name always gives the same weights. Every site sees 154 video tokens at resolution 0 and 216 at
resolution 1, no multiples of 64, so that the last block of every order is ragged; text and audio lengths differ.
"""

from __future__ import annotations

import importlib
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests.models.handwritten import FusedDiT, InlineDiT, RearrangeDiT

Grid = tuple[int, int, int]
GRIDS: tuple[Grid, Grid] = ((2, 7, 11), (4, 6, 9))  # video tokens as (T, H, W): 154 and 216
TEXT = 17  # text tokens


@dataclass(frozen=True)
class Case:
    """One model of the zoo and what a test has to know about it."""

    name: str
    build: Callable[[], nn.Module]
    """A new model, seeded by the case's name: eval mode, fp32, no weight left at zero."""
    inputs: Callable[[int], dict[str, Any]]
    """Keyword inputs of forward at resolution 0 or 1."""
    sites: tuple[str, ...]
    """Owner modules of exactly the self-attention calls that see the video, in execution order."""
    output: Callable[[Any], Tensor]
    """The tensor to compare, from what forward returned."""
    projections: dict[str, str]
    """Names of the query, key, value and out Linear of the first site; a fused qkv has its name three times."""
    repeated_blocks: tuple[str, ...]
    """Modules to `.compile()` one by one for per-block compilation."""
    note: str = ""
    kind: str = "self"
    """What every site is: "self", "joint" when queries and keys hold text beside the video, or "mixed" when only the
    keys hold more than the queries."""
    text: str = "none"
    """Where the rest stands in the sequence: "before" or "after" the video, or "prefix", before it among keys only."""
    mask: str = ""
    """What masks the sites: "keys" (B, 1, 1, S), "padding" (square: valid by valid tokens), "causal" (square: blocks of
    frames), "blocks" (a `BlockMask` of flex_attention), or nothing."""
    text_projections: dict[str, str] = field(default_factory=dict)
    """Query, key, value and out Linear of the text at the first site, where the two streams have their own."""
    calls: int = 1
    """Attention calls that each site makes in one forward, one after another for the samples of a batch."""
    fullgraph: bool = True
    """Whether `torch.compile(fullgraph=True)` takes the whole model."""
    fake: bool = True
    """Whether forward runs under `FakeTensorMode(allow_non_fake_inputs=True)`."""
    grid: Callable[[Any], tuple[int, int, int]] | None = None
    """What a user has to pass as `grid=`, where no argument of forward shows it."""


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Redraw every floating-point parameter of ``model`` in place, and return it.

    Matrices and kernels get variance 1 / fan-in, 1-D weights (norm scales) lie around 1, all else (biases, modulation
    tables, learned positions) around 0 with deviation 0.2. Nothing that a library initialises to zero, such as gates,
    adaLN projections and output layers, stays zero, and activations stay of order 1. Buffers are left alone.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point():
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if name.rpartition(".")[2] != "weight":
                values = 0.2 * noise
            elif parameter.ndim == 1:
                values = 1 + 0.1 * noise
            else:
                values = noise / math.sqrt(parameter[0].numel())
            parameter.copy_(values.to(parameter))
    return model


def _seed(name: str) -> int:
    return zlib.crc32(name.encode())


def _build(name: str, make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_seed(name))
        return randomise(make(), _seed(name)).eval()


def from_diffusers(name: str, config: dict[str, Any]) -> nn.Module:
    """diffusers is imported only here: collecting tests and the hand-written cases do without it."""
    model: nn.Module = getattr(importlib.import_module("diffusers"), name)(**config)
    return model


class Draw:
    """Seeded normal tensors for one case at one resolution."""

    def __init__(self, name: str, resolution: int) -> None:
        self.generator = torch.Generator().manual_seed(_seed(name) + 1 + resolution)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)


def _sample(output: Any) -> Tensor:
    tensor: Tensor = output.sample
    return tensor


def numbered(pattern: str, count: int = 2) -> tuple[str, ...]:
    return tuple(pattern.format(i) for i in range(count))


def linears(
    owner: str, query: str = "to_q", key: str = "to_k", value: str = "to_v", out: str = "to_out.0"
) -> dict[str, str]:
    return {
        kind: f"{owner}.{leaf}"
        for kind, leaf in zip(("query", "key", "value", "out"), (query, key, value, out), strict=True)
    }


def make_case(
    name: str,
    make: Callable[[], nn.Module],
    inputs: Callable[[Draw, Grid], dict[str, Any]],
    *,
    sites: tuple[str, ...],
    blocks: tuple[str, ...],
    projections: dict[str, str] | None = None,
    output: Callable[[Any], Tensor] = _sample,
    grids: tuple[Grid, Grid] = GRIDS,
    note: str = "",
    **more: Any,
) -> Case:
    return Case(
        name=name,
        build=lambda: _build(name, make),
        inputs=lambda resolution: inputs(Draw(name, resolution), grids[resolution]),
        sites=sites,
        output=output,
        projections=projections or (linears(sites[0]) if sites else {}),
        repeated_blocks=blocks,
        note=note,
        **more,
    )


# ---------------------------------------------------------------- hand-written


def _handwritten(text_dim: int) -> Callable[[Draw, Grid], dict[str, Any]]:
    def inputs(draw: Draw, grid: Grid) -> dict[str, Any]:
        return {
            "x": draw(1, 4, grid[0], 2 * grid[1], 2 * grid[2]),
            "t": torch.tensor([0.4]),
            "text": draw(1, TEXT, text_dim),
        }

    return inputs


def _handwritten_cases() -> list[Case]:
    return [
        make_case(
            "handwritten_fused",
            FusedDiT,
            _handwritten(24),
            sites=numbered("blocks.{}.attn"),
            blocks=numbered("blocks.{}"),
            projections=linears("blocks.0.attn", "qkv", "qkv", "qkv", "proj"),
            output=lambda output: output,
            note="fused qkv, reshape and unbind, adaLN, 3-D rope on halves",
        ),
        make_case(
            "handwritten_rearrange",
            RearrangeDiT,
            _handwritten(20),
            sites=numbered("layers.{}.self_attn"),
            blocks=numbered("layers.{}"),
            projections=linears("layers.0.self_attn", "wq", "wk", "wv", "wo"),
            output=lambda output: output,
            note="separate Linears, rearranges, qk RMSNorm, complex rope",
        ),
        make_case(
            "handwritten_inline",
            InlineDiT,
            _handwritten(28),
            sites=numbered("blocks.{}"),
            blocks=numbered("blocks.{}"),
            projections=linears("blocks.0", "q", "k", "v", "out"),
            output=lambda output: output,
            note="no attention module: self- and cross-attention in the block's own forward, no rope",
        ),
    ]


# ---------------------------------------------------------------- the Wan family

WAN: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 48,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}


def _wan_inputs(draw: Draw, grid: Grid) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 4, grid[0], 2 * grid[1], 2 * grid[2]),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": draw(1, TEXT, 16),
    }


def _vace_inputs(draw: Draw, grid: Grid) -> dict[str, Any]:
    return _wan_inputs(draw, grid) | {"control_hidden_states": draw(1, 6, grid[0], 2 * grid[1], 2 * grid[2])}


def _animate_inputs(draw: Draw, grid: Grid) -> dict[str, Any]:
    # The reference frame has no pose, and the face encoder reads four video frames per further latent frame. Wan takes
    # the last 512 tokens for text and what stands before them for the image: fewer than 512 would leave the image none.
    size = (2 * grid[1], 2 * grid[2])
    return _wan_inputs(draw, grid) | {
        "hidden_states": draw(1, 12, grid[0], *size),
        "encoder_hidden_states": draw(1, 512, 16),
        "encoder_hidden_states_image": draw(1, 5, 8),
        "pose_hidden_states": draw(1, 4, grid[0] - 1, *size),
        "face_pixel_values": draw(1, 3, 1 + 4 * (grid[0] - 2), 16, 16),
    }


def _anyflow_inputs(draw: Draw, grid: Grid) -> dict[str, Any]:
    # AnyFlow wants frames before channels and a timestep per latent frame.
    return _wan_inputs(draw, grid) | {
        "hidden_states": draw(1, grid[0], 4, 2 * grid[1], 2 * grid[2]),
        "timestep": torch.full((1, grid[0]), 500.0),
        "r_timestep": torch.full((1, grid[0]), 300.0),
    }


def _wan_family() -> list[Case]:
    blocks, sites = numbered("blocks.{}"), numbered("blocks.{}.attn1")
    vace_blocks = numbered("vace_blocks.{}")

    def case(name: str, inputs: Callable[[Draw, Grid], dict[str, Any]] = _wan_inputs, **changes: Any) -> Case:
        return make_case(
            name,
            lambda: from_diffusers(f"{name}Transformer3DModel", WAN | changes),
            inputs,
            sites=sites,
            blocks=blocks,
        )

    vace = make_case(
        "WanVACE",
        lambda: from_diffusers("WanVACETransformer3DModel", WAN | {"vace_layers": [0, 1], "vace_in_channels": 6}),
        _vace_inputs,
        sites=numbered("vace_blocks.{}.attn1") + sites,
        blocks=vace_blocks + blocks,
        note="the control blocks run first and are video self-attention too",
    )
    animate = case(
        "WanAnimate",
        _animate_inputs,
        in_channels=12,
        latent_channels=4,
        image_dim=8,
        added_kv_proj_dim=24,
        motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=8,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )
    # Without history latents, the convolutions that patch them would get no gradient, and DDP rejects that.
    helios = {key: value for key, value in WAN.items() if key != "rope_max_seq_len"}
    helios |= {"rope_dim": (4, 4, 4), "has_multi_term_memory_patch": False}
    return [
        case("Wan"),
        vace,
        animate,
        case("ChronoEdit", rope_temporal_skip_len=3),
        case("SkyReelsV2"),
        case("AnyFlow", _anyflow_inputs),
        make_case(
            "Helios",
            lambda: from_diffusers("HeliosTransformer3DModel", helios),
            _wan_inputs,
            sites=sites,
            blocks=blocks,
            note="without history latents, so that the tokens are one grid",
        ),
    ]


# ---------------------------------------------------------------- LTX


def _ltx_inputs(draw: Draw, grid: Grid) -> dict[str, Any]:
    mask = torch.ones(1, TEXT)
    mask[:, -4:] = 0
    return {
        "hidden_states": draw(1, math.prod(grid), 8),
        "encoder_hidden_states": draw(1, TEXT, 16),
        "timestep": torch.tensor([500.0]),
        "encoder_attention_mask": mask,
        "num_frames": grid[0],
        "height": grid[1],
        "width": grid[2],
    }


def _ltx2_inputs(draw: Draw, grid: Grid) -> dict[str, Any]:
    frames = 23 + grid[0]
    return _ltx_inputs(draw, grid) | {
        "audio_hidden_states": draw(1, frames, 6),
        "audio_encoder_hidden_states": draw(1, TEXT, 16),
        "audio_encoder_attention_mask": torch.ones(1, TEXT),
        "audio_num_frames": frames,
    }


def _ltx_family() -> list[Case]:
    base: dict[str, Any] = {
        "in_channels": 8,
        "out_channels": 8,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "cross_attention_dim": 32,
        "num_layers": 2,
        "caption_channels": 16,
    }
    audio: dict[str, Any] = {
        "audio_in_channels": 6,
        "audio_out_channels": 6,
        "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 8,
        "audio_cross_attention_dim": 16,
    }
    sites, blocks = numbered("transformer_blocks.{}.attn1"), numbered("transformer_blocks.{}")
    return [
        make_case(
            "LTXVideo",
            lambda: from_diffusers("LTXVideoTransformer3DModel", base),
            _ltx_inputs,
            sites=sites,
            blocks=blocks,
            note="packed tokens: the grid is known from num_frames, height and width only",
        ),
        make_case(
            "LTX2Video",
            lambda: from_diffusers("LTX2VideoTransformer3DModel", base | audio),
            _ltx2_inputs,
            sites=sites,
            blocks=blocks,
            output=lambda output: torch.cat([output.sample.flatten(1), output.audio_sample.flatten(1)], dim=1),
            note="video and audio; audio self-attention (audio_attn1) is not a site",
        ),
    ]


# ---------------------------------------------------------------- others


def _cosmos_inputs(draw: Draw, grid: Grid) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 4, grid[0], 2 * grid[1], 2 * grid[2]),
        "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": draw(1, TEXT, 16),
        "fps": 16,
    }


def _cosmos() -> Case:
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "mlp_ratio": 2.0,
        "text_embed_dim": 16,
        "adaln_lora_dim": 8,
        "max_size": (8, 32, 32),
        # The padding mask is resized by torchvision, which the test environment does not have.
        "concat_padding_mask": False,
    }
    return make_case(
        "Cosmos",
        lambda: from_diffusers("CosmosTransformer3DModel", config),
        _cosmos_inputs,
        sites=numbered("transformer_blocks.{}.attn1"),
        blocks=numbered("transformer_blocks.{}"),
        note="no padding mask: it would need torchvision",
    )


def _kandinsky5_inputs(draw: Draw, grid: Grid) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, grid[0], 2 * grid[1], 2 * grid[2], 4),
        "encoder_hidden_states": draw(1, TEXT, 16),
        "timestep": torch.tensor([500.0]),
        "pooled_projections": draw(1, 12),
        "visual_rope_pos": tuple(torch.arange(length) for length in grid),
        "text_rope_pos": torch.arange(TEXT),
    }


def _kandinsky5() -> Case:
    config = {
        "in_visual_dim": 4,
        "out_visual_dim": 4,
        "in_text_dim": 16,
        "in_text_dim2": 12,
        "time_dim": 16,
        "model_dim": 24,
        "ff_dim": 48,
        "num_text_blocks": 2,
        "num_visual_blocks": 2,
        "axes_dims": (4, 4, 4),
    }
    return make_case(
        "Kandinsky5",
        lambda: from_diffusers("Kandinsky5Transformer3DModel", config),
        _kandinsky5_inputs,
        sites=numbered("visual_transformer_blocks.{}.self_attention"),
        blocks=numbered("visual_transformer_blocks.{}"),
        projections=linears(
            "visual_transformer_blocks.0.self_attention", "to_query", "to_key", "to_value", "out_layer"
        ),
        note="channels last; the text blocks' self-attention is not a site",
    )


def _allegro_inputs(draw: Draw, grid: Grid) -> dict[str, Any]:
    embeddings = importlib.import_module("diffusers.models.embeddings")
    rope = embeddings.get_3d_rotary_pos_embed_allegro(
        embed_dim=12, crops_coords=((0, 0), grid[1:]), grid_size=grid[1:], temporal_size=grid[0]
    )
    positions = torch.cartesian_prod(*(axis.long() for axis in rope[3:])).T[:, None]
    return {
        "hidden_states": draw(1, 4, grid[0], 2 * grid[1], 2 * grid[2]),
        "encoder_hidden_states": draw(1, TEXT, 16),
        "timestep": torch.tensor([500]),
        "image_rotary_emb": (rope[:3], tuple(positions)),
    }


def _allegro() -> Case:
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "cross_attention_dim": 24,
        "sample_height": 16,
        "sample_width": 24,
        "sample_frames": 4,
        "caption_channels": 16,
    }
    return make_case(
        "Allegro",
        lambda: from_diffusers("AllegroTransformer3DModel", config),
        _allegro_inputs,
        sites=numbered("transformer_blocks.{}.attn1"),
        blocks=numbered("transformer_blocks.{}"),
    )


def _latte_inputs(draw: Draw, grid: Grid) -> dict[str, Any]:
    return {
        "hidden_states": draw(1, 4, grid[0], 2 * grid[1], 2 * grid[2]),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": draw(1, TEXT, 16),
    }


def _latte() -> Case:
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "cross_attention_dim": 24,
        "attention_bias": True,
        "sample_size": 24,
        "patch_size": 2,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "caption_channels": 16,
        "video_length": 2,
    }
    return make_case(
        "Latte",
        lambda: from_diffusers("LatteTransformer3DModel", config),
        _latte_inputs,
        sites=numbered("transformer_blocks.{}.attn1"),
        blocks=numbered("transformer_blocks.{}"),
        grids=((2, 11, 14), (2, 12, 18)),  # a site sees one frame; the learned temporal positions fix T
        note="attention within a frame, batch B*T; the temporal blocks (T tokens) are not sites",
    )


CASES: dict[str, Case] = {
    case.name: case
    for case in [*_handwritten_cases(), *_wan_family(), *_ltx_family(), _cosmos(), _kandinsky5(), _allegro(), _latte()]
}
