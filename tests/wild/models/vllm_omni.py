"""vllm_omni: video models with the layers of vLLM."""

from __future__ import annotations

from tests.wild.case import Wild

MODELS = "vllm_omni.diffusion.models"
NEEDS = "its modules use vLLM's linear layers and much else of it when imported, and vLLM is not here"

ENTRIES: dict[str, Wild] = {}

WITHOUT_ENTRY: dict[str, str] = {
    f"{MODELS}.hunyuan_video.hunyuan_video_15_transformer.HunyuanVideo15IndividualTokenRefiner": "refines text",
}

CANNOT_BE_IMPORTED: dict[str, str] = {
    f"{MODELS}.anima.anima_transformer.AnimaTransformer3DModel": NEEDS,
    f"{MODELS}.cosmos3.transformer_cosmos3.Cosmos3VFMTransformer": NEEDS,
    f"{MODELS}.cosmos3.transformer_cosmos3_edge.Cosmos3EdgeVFMTransformer": NEEDS,
    f"{MODELS}.dreamzero.causal_wan_model.CausalWanModel": NEEDS,
    f"{MODELS}.helios.helios_transformer.HeliosTransformer3DModel": NEEDS,
    f"{MODELS}.hunyuan_video.hunyuan_video_15_transformer.HunyuanVideo15Transformer3DModel": NEEDS,
    f"{MODELS}.lingbot_video.lingbot_video_transformer.LingBotVideoTransformer3DModel": NEEDS,
    f"{MODELS}.lingbot_world.transformer.CausalLingBotWorldTransformer3DModel": NEEDS,
    f"{MODELS}.longcat_video.longcat_video_avatar_transformer.LongCatVideoAvatarTransformer3DModel": NEEDS,
    f"{MODELS}.ltx2.ltx2_transformer.LTX2VideoTransformer3DModel": NEEDS,
    f"{MODELS}.minimax_h3.minimax_h3_transformer.MiniMaxH3DiTModel": NEEDS,
    f"{MODELS}.sana_video.transformer_sana_video.SanaVideoTransformer3DModel": NEEDS,
    f"{MODELS}.sana_wm.sana_wm_transformer.SanaWmTransformer3DModel": NEEDS,
    f"{MODELS}.wan2_2.wan2_2_s2v_transformer.WanS2VTransformer3DModel": NEEDS,
    f"{MODELS}.wan2_2.wan2_2_transformer.WanTransformer3DModel": NEEDS,
    f"{MODELS}.wan2_2.wan2_2_vace_transformer.WanVACETransformer3DModel": NEEDS,
}
