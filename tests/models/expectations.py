"""What of the zoo is not converted and why, and what its models compute only to drop it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from tests.models.zoo import Case


@dataclass(frozen=True)
class Dense:
    """A case without a site to convert: what the report says (`seen`), and why (`reason`)."""

    seen: str
    reason: str


_BLOCK_MASK = Dense("block mask", "its attention is sparse already: flex_attention with a block mask of its own")

DENSE: Mapping[str, Dense] = MappingProxyType(
    {
        "SanaVideo": Dense("cross-attention", "its self-attention is linear already, and calls no attention function"),
        "SkyReelsV2Causal": Dense("differs from query to query", "block-causal: frames attend to earlier frames only"),
        "AnyFlowFAR": _BLOCK_MASK,
        "AnyFlowFARContext": _BLOCK_MASK,
        "WanAnimate2Cached": _BLOCK_MASK,
        "Kandinsky5Nabla": _BLOCK_MASK,
        "Kandinsky6SR": _BLOCK_MASK,
        "SanaWMRefinerCached": Dense("385 keys", "most of its keys come from a cache, from no projection of the model"),
    }
)

# Parts of names of parameters whose gradient is zero or missing: text that the last block computes and nobody reads.
_TEXT_OF_THE_LAST_BLOCK = ("salad.low_rank_text_",)
GAPS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    dict.fromkeys(("HunyuanVideo15", "HunyuanVideo15I2V", "Mochi"), _TEXT_OF_THE_LAST_BLOCK)
)


# Cases whose query and key have no position encoding between projection and attention, so that map-then-rotate and
# rotate-then-map are one. There is no case whose encoding cannot be told from the rest.
WITHOUT_POSITION: Mapping[str, str] = MappingProxyType(
    {
        "handwritten_inline": "absolute positions",
        "handwritten_multihead": "rotates what the projection reads",
        "handwritten_multihead_seq_first": "rotates what the projection reads",
        "Latte": "absolute positions",
        "CogVideoX": "absolute positions in this configuration",
    }
)


# Further cases of a class that another case stands for. CI does not compile them: `--all-cases` and the table do.
VARIANTS = frozenset(
    {
        "CogVideoXRope",
        "CogVideoX15",
        "HunyuanVideoI2V",
        "HunyuanVideoTokenReplace",
        "HunyuanVideo15I2V",
        "MotifVideoDecoder",
        "Cosmos2",
        "Cosmos25",
        "handwritten_einsum",
        "handwritten_flash",
        "handwritten_multihead_seq_first",
        "handwritten_scaled",
        "handwritten_dropout",
    }
)


def seen_as(case: Case) -> tuple[str, str]:
    """Kind of the first site, and where its text lies."""
    return case.kind, case.text


def converted_sites(case: Case) -> tuple[str, ...]:
    """The owners of exactly the sites that are converted, in execution order."""
    if case.name == "SanaWM":  # its camera attention joins key and value on the heads and stays dense
        return case.sites[:1]
    return case.sites
