"""xfuser: classes of diffusers with attention that several processes share."""

from __future__ import annotations

from tests.wild.case import Wild

MODELS = "xfuser.model_executor.models.transformers"
NEEDS = "importing it raises NotImplementedError without an accelerator"

ENTRIES: dict[str, Wild] = {}

WITHOUT_ENTRY: dict[str, str] = {}

CANNOT_BE_IMPORTED: dict[str, str] = {
    f"{MODELS}.cogvideox_transformer_3d.xFuserCogVideoXTransformer3DWrapper": NEEDS,
    f"{MODELS}.consisid_transformer_3d.xFuserConsisIDTransformer3DWrapper": NEEDS,
    f"{MODELS}.latte_transformer_3d.xFuserLatteTransformer3DWrapper": NEEDS,
    f"{MODELS}.transformer_causal_wan.xFuserCausalWanTransformer3DWrapper": NEEDS,
    f"{MODELS}.transformer_hunyuan_video.xFuserHunyuanVideoTransformer3DWrapper": NEEDS,
    f"{MODELS}.transformer_hunyuan_video15.xFuserHunyuanVideo15Transformer3DWrapper": NEEDS,
    f"{MODELS}.transformer_ltx2.xFuserLTX2VideoTransformer3DWrapper": NEEDS,
    f"{MODELS}.transformer_minimax_h3.xFuserMiniMaxH3Transformer3DWrapper": NEEDS,
    f"{MODELS}.transformer_wan.xFuserWanTransformer3DWrapper": NEEDS,
    f"{MODELS}.transformer_wan_vace.xFuserWanVACETransformer3DWrapper": NEEDS,
}
