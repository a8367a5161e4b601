"""cosmos_predict2: the original Cosmos-Predict 2."""

from __future__ import annotations

from tests.wild.case import Wild

NEEDS = "its modules use omegaconf, hydra and transformer_engine when imported, which are not here"

ENTRIES: dict[str, Wild] = {}

WITHOUT_ENTRY: dict[str, str] = {}

CANNOT_BE_IMPORTED: dict[str, str] = {
    "cosmos_predict2.models.multiview_dit.MultiViewDiT": NEEDS,
    "cosmos_predict2.models.text2image_dit.MiniTrainDIT": NEEDS,
    "cosmos_predict2.models.video2world_action_dit.ActionConditionedMinimalV1LVGDiT": NEEDS,
    "cosmos_predict2.models.video2world_dit.MinimalV1LVGDiT": NEEDS,
}
