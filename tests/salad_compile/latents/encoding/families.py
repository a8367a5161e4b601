"""Tiny pipelines of the families that are trained, of the real classes, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.salad_compile.latents.encoding.world import TEXT_WIDTH, WORDS, t5, tokenizer, wan_transformer, wan_vae
from tests.support import seeded

IMAGE_WIDTH = 8


def _scheduler() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler()


def wan_two_experts() -> Any:
    from diffusers import WanPipeline

    return WanPipeline(
        tokenizer=tokenizer(),
        text_encoder=t5("UMT5"),
        vae=wan_vae(),
        scheduler=_scheduler(),
        transformer=wan_transformer(),
        transformer_2=wan_transformer(),
        boundary_ratio=0.875,
    )


def wan_vace() -> Any:
    from diffusers import WanVACEPipeline, WanVACETransformer3DModel

    config = {**wan_transformer(num_layers=2).config, "vace_layers": [0, 1], "vace_in_channels": 96}
    parts = {"tokenizer": tokenizer(), "text_encoder": t5("UMT5"), "vae": wan_vae(), "scheduler": _scheduler()}
    return WanVACEPipeline(**parts, transformer=WanVACETransformer3DModel.from_config(config).eval())


def _large_vae() -> Any:
    """As Wan 2.2 5B has it: patches, residual blocks, channels of its own."""
    mean, std = tuple(0.01 * number - 0.2 for number in range(48)), tuple(0.5 + 0.02 * number for number in range(48))
    return wan_vae(
        z_dim=48,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        latents_mean=mean,
        latents_std=std,
        base_dim=8,
        decoder_base_dim=8,
    )


def wan_ti2v() -> Any:
    from diffusers import WanPipeline

    transformer = wan_transformer(in_channels=48, out_channels=48)
    parts = {"tokenizer": tokenizer(), "text_encoder": t5("UMT5"), "vae": _large_vae(), "scheduler": _scheduler()}
    return WanPipeline(**parts, transformer=transformer, expand_timesteps=True)


def wan_ti2v_image() -> Any:
    from diffusers import WanImageToVideoPipeline

    return WanImageToVideoPipeline(**wan_ti2v().components, expand_timesteps=True)


def wan_image(features: bool = True, **changes: Any) -> Any:
    """Wan 2.1 image-to-video, and without features Wan 2.2's: 16 + 4 + 16 channels."""
    from diffusers import WanImageToVideoPipeline
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=IMAGE_WIDTH,
        projection_dim=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        intermediate_size=16,
        patch_size=16,
    )
    parts = {
        "image_encoder": CLIPVisionModel(config).eval(),
        "image_processor": CLIPImageProcessor(crop_size=32, size=32),
    }
    return WanImageToVideoPipeline(
        tokenizer=tokenizer(),
        text_encoder=t5("UMT5"),
        vae=wan_vae(),
        scheduler=_scheduler(),
        transformer=wan_transformer(in_channels=36, image_dim=IMAGE_WIDTH if features else None, **changes),
        **(parts if features else {}),
    )


def wan_image_without_features() -> Any:
    return wan_image(features=False)


def wan_first_and_last() -> Any:
    """As Wan2.1-FLF2V: the image encoder sees both frames, of 5 tokens each."""
    return wan_image(pos_embed_seq_len=10, added_kv_proj_dim=24)


def _ltx_parts() -> dict[str, Any]:
    from diffusers import AutoencoderKLLTXVideo, LTXVideoTransformer3DModel

    widths = {"block_out_channels": (8, 8, 8, 8), "decoder_block_out_channels": (8, 8, 8, 8)}
    layers = {"layers_per_block": (1, 1, 1, 1, 1), "decoder_layers_per_block": (1, 1, 1, 1, 1)}
    vae = AutoencoderKLLTXVideo(latent_channels=8, **widths, **layers, scaling_factor=1.5).eval()
    draw = torch.Generator().manual_seed(3)
    vae.latents_mean.copy_(torch.randn(8, generator=draw))
    vae.latents_std.copy_(torch.rand(8, generator=draw) + 0.5)
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=TEXT_WIDTH,
    )
    parts = {"scheduler": _scheduler(), "vae": vae, "transformer": transformer}
    return {**parts, "tokenizer": tokenizer(), "text_encoder": t5()}


def ltx() -> Any:
    from diffusers import LTXPipeline

    return LTXPipeline(**_ltx_parts())


def ltx_image() -> Any:
    from diffusers import LTXImageToVideoPipeline

    return LTXImageToVideoPipeline(**_ltx_parts())


def _words() -> Any:
    """A tokenizer of whole words, for the template of HunyuanVideo's image-to-video pipeline, whose image is sixth."""
    import re

    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video_image2video import DEFAULT_PROMPT_TEMPLATE
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "<unk>", "<image>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    words = re.findall(r"\w+|[^\w\s]", " ".join([str(DEFAULT_PROMPT_TEMPLATE["template"]), *WORDS]))
    known = dict.fromkeys([*special, *words])
    model = Tokenizer(models.WordLevel({word: number for number, word in enumerate(known)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    model.add_special_tokens(special)
    model.post_processor = processors.TemplateProcessing(single="<s> <s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", bos_token="<s>", unk_token="<unk>")


def _llava(words: Any) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    sizes = {"intermediate_size": 16, "num_attention_heads": 2}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    vision = CLIPVisionConfig(
        hidden_size=IMAGE_WIDTH, num_hidden_layers=2, image_size=336, patch_size=14, projection_dim=8, **sizes
    )
    text = LlamaConfig(
        hidden_size=TEXT_WIDTH,
        num_hidden_layers=3,
        vocab_size=len(words),
        max_position_embeddings=2048,
        **sizes,
        **ends,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=3, pad_token_id=0)
    return LlavaForConditionalGeneration(config).eval()


def hunyuan_image(kind: str = "latent_concat", in_channels: int = 9) -> Any:
    from diffusers import HunyuanVideoImageToVideoPipeline
    from transformers import CLIPImageProcessor

    parts, words = hunyuan().components, _words()
    config = {name: value for name, value in parts["transformer"].config.items() if not name.startswith("_")}
    config |= {"in_channels": in_channels, "image_condition_type": kind}
    own = {
        "transformer": type(parts["transformer"])(**config),
        "tokenizer": words,
        "text_encoder": _llava(words),
        "image_processor": CLIPImageProcessor(size=336, crop_size=336),
    }
    return HunyuanVideoImageToVideoPipeline(**{**parts, **own})


def hunyuan_image_replacing() -> Any:
    return hunyuan_image("token_replace", in_channels=4)


def hunyuan() -> Any:
    from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoPipeline, HunyuanVideoTransformer3DModel
    from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

    words = tokenizer()
    sizes = {"hidden_size": TEXT_WIDTH, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": len(words)}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    llama = LlamaModel(LlamaConfig(**sizes, **ends, num_hidden_layers=3, max_position_embeddings=512))
    clip = CLIPTextModel(CLIPTextConfig(**sizes, **ends, num_hidden_layers=1, max_position_embeddings=77))
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    )
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=2,
        text_embed_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        rope_axes_dim=(2, 4, 4),
    )
    return HunyuanVideoPipeline(
        text_encoder=llama.eval(),
        tokenizer=words,
        text_encoder_2=clip.eval(),
        tokenizer_2=tokenizer(),
        transformer=transformer,
        vae=vae.eval(),
        scheduler=_scheduler(),
    )


def _cogvideo_parts(in_channels: int) -> dict[str, Any]:
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXTransformer3DModel

    vae = AutoencoderKLCogVideoX(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2
    )
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=in_channels,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=TEXT_WIDTH,
        num_layers=1,
        sample_width=6,
        sample_height=4,
        sample_frames=5,
        patch_size=2,
    )
    parts = {"vae": vae.eval(), "transformer": transformer, "scheduler": CogVideoXDDIMScheduler()}
    return {**parts, "tokenizer": tokenizer(), "text_encoder": t5()}


def cogvideo() -> Any:
    from diffusers import CogVideoXPipeline

    return CogVideoXPipeline(**_cogvideo_parts(4))


def cogvideo_image() -> Any:
    from diffusers import CogVideoXImageToVideoPipeline

    return CogVideoXImageToVideoPipeline(**_cogvideo_parts(8))


TEXT_TO_VIDEO = (wan_two_experts, wan_ti2v, ltx, hunyuan, cogvideo)
IMAGE_TO_VIDEO = (wan_image, wan_image_without_features, wan_ti2v_image, ltx_image, cogvideo_image)


def build(make: Callable[[], Any]) -> Any:
    """Always the same weights."""
    with seeded(0):
        return make()
