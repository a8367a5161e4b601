"""The rows of the experiment: what each one changes, and the model it trains. All start from the same dense model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn as nn
from model import VideoDiT
from plain_lora import add_low_rank, make_linear
from presets import Preset
from train import Batches, Recipe

import salad_compile
from salad_compile.definition.spec import BLOCK_SIZES

Kind = Literal["dense", "linear", "salad"]
SPARSITY = 0.9


@dataclass(frozen=True)
class Arm:
    """One row.

    Attributes:
        kind: plain attention, linear attention alone, or a model that `salad_compile.convert` converted.
        settings: fields of SaladConfig that differ from the experiment's defaults.
        query_blocks: length of a query block in key blocks.
        smallest_blocks: whether blocks have 16 tokens instead of the preset's number.
        trained: whether anything is trained.
        of, drop: the share `drop` of the linear branches is dropped from the trained arm `of`; 1 is all of them.
        longer: factor of the number of training steps.
        teacher: share of the target that is what the dense model predicts.
    """

    name: str
    about: str
    group: str
    kind: Kind = "salad"
    settings: Mapping[str, Any] = field(default_factory=dict)
    query_blocks: int = 1
    smallest_blocks: bool = False
    trained: bool = True
    of: str | None = None
    drop: float = 0.0
    longer: int = 1
    teacher: float = 0.0


_MAIN, _LONG, _BRANCH, _BLOCKS = "Main arms", "Four times as many steps", "The linear branch", "The blocks"
_TAIL = "Compensation: means of what is left out, in the same softmax"
_CHOSEN = "Compensation: which blocks are computed"
_TAUGHT = "The dense model as a teacher"
_AFTER_MAP = {"rope_placement": "map-then-rotate"}


def _tail(pool: int, **settings: Any) -> dict[str, Any]:
    return {"compensation": "tail", "compensation_pool": pool, **settings}


_ERROR = _tail(64, pattern="error8", **_AFTER_MAP)
_MASS_LORA = {"linear_branch": False, "pattern": "mass8"}
ARMS = (
    Arm("dense", "as pre-trained", _MAIN, kind="dense", trained=False),
    Arm("dense-tuned", "LoRA, dense attention: the fair reference", _MAIN, kind="dense"),
    Arm("sparse-only", "converted, not trained", _MAIN, trained=False),
    Arm("sparse-lora", "sparse attention and LoRA, no linear branch", _MAIN, settings={"linear_branch": False}),
    Arm("salad", "SALAD, Top-K, rotate-then-map", _MAIN),
    Arm("salad-stswa", "SALAD, sliding windows", _MAIN, settings={"pattern": "stswa"}),
    Arm("linear-only", "linear attention and LoRA, no sparse branch", _MAIN, kind="linear"),
    Arm("dense-tuned-long", "as dense-tuned", _LONG, kind="dense", longer=4),
    Arm("sparse-lora-long", "as sparse-lora", _LONG, settings={"linear_branch": False}, longer=4),
    Arm("salad-long", "as salad", _LONG, longer=4),
    Arm("rope-long", "SALAD, map-then-rotate", _LONG, settings={"rope_placement": "map-then-rotate"}, longer=4),
    Arm(
        "rope-16-long",
        "the same, blocks of 16 tokens",
        _LONG,
        settings={"rope_placement": "map-then-rotate"},
        smallest_blocks=True,
        longer=4,
    ),
    Arm(
        "sparse-lora-16-long",
        "no linear branch, blocks of 16 tokens",
        _LONG,
        settings={"linear_branch": False},
        smallest_blocks=True,
        longer=4,
    ),
    Arm("gate-none", "no gate", _BRANCH, settings={"gate": "none"}),
    Arm(
        "gate-static", "learned scales of layer and heads, no gate", _BRANCH, settings={"gate": "none", "scaling": "v2"}
    ),
    Arm("gate-head", "one gate per token and head", _BRANCH, settings={"gate": "head"}),
    Arm("scaling-v2", "learned scales times the gate", _BRANCH, settings={"scaling": "v2"}),
    Arm("rope-after-map", "map-then-rotate", _BRANCH, settings={"rope_placement": "map-then-rotate"}),
    Arm("map-elu", "elu + 1 for relu", _BRANCH, settings={"feature_map": "elu"}),
    Arm("map-softmax", "softmax over the head for relu", _BRANCH, settings={"feature_map": "softmax"}),
    Arm("drop-20", "20 % of the trained branches dropped", _BRANCH, trained=False, of="salad", drop=0.2),
    Arm("drop-all", "all trained branches dropped", _BRANCH, trained=False, of="salad", drop=1.0),
    Arm("sparsity-80", "sparsity 0.8", _BLOCKS, settings={"sparsity": 0.8}),
    Arm("sparsity-95", "sparsity 0.95", _BLOCKS, settings={"sparsity": 0.95}),
    Arm("order-flat", "runs of the native order", _BLOCKS, settings={"token_order": "flat"}),
    Arm("blocks-128", "query blocks of 128 tokens", _BLOCKS, query_blocks=2),
    Arm("blocks-16", "blocks of 16 tokens: 25 of 256 are kept", _BLOCKS, smallest_blocks=True),
    Arm(
        "rope-16",
        "the same, map-then-rotate",
        _BLOCKS,
        settings={"rope_placement": "map-then-rotate"},
        smallest_blocks=True,
    ),
    Arm(
        "sparse-lora-16",
        "no linear branch, blocks of 16 tokens",
        _BLOCKS,
        settings={"linear_branch": False},
        smallest_blocks=True,
    ),
    Arm(
        "sparse-lora-80", "no linear branch, sparsity 0.8", _BLOCKS, settings={"linear_branch": False, "sparsity": 0.8}
    ),
    Arm(
        "sparse-lora-95",
        "no linear branch, sparsity 0.95",
        _BLOCKS,
        settings={"linear_branch": False, "sparsity": 0.95},
    ),
    Arm(
        "sparse-lora-flat",
        "no linear branch, native order",
        _BLOCKS,
        settings={"linear_branch": False, "token_order": "flat"},
    ),
    Arm("tail-only", "means of 64 tokens, not trained", _TAIL, settings=_tail(64), trained=False),
    Arm("tail-256-only", "means of 256 tokens, not trained", _TAIL, settings=_tail(256), trained=False),
    Arm("tail-lora", "means of 64, no linear branch", _TAIL, settings=_tail(64, linear_branch=False)),
    Arm("tail", "SALAD with means of 64, map-then-rotate", _TAIL, settings=_tail(64, **_AFTER_MAP)),
    Arm("tail-256", "the same with means of 256", _TAIL, settings=_tail(256, **_AFTER_MAP)),
    Arm("tail-128", "the same, query blocks of 128", _TAIL, settings=_tail(64, **_AFTER_MAP), query_blocks=2),
    Arm("tail-16", "the same, blocks of 16", _TAIL, settings=_tail(64, **_AFTER_MAP), smallest_blocks=True),
    Arm("tail-lora-16", "no linear branch, blocks of 16", _TAIL, "salad", _tail(64, linear_branch=False), 1, True),
    Arm("tail-80", "sparsity 0.8", _TAIL, settings=_tail(64, sparsity=0.8, **_AFTER_MAP)),
    Arm("tail-95", "sparsity 0.95", _TAIL, settings=_tail(64, sparsity=0.95, **_AFTER_MAP)),
    Arm("tail-gate-none", "no gate", _TAIL, settings=_tail(64, gate="none", **_AFTER_MAP)),
    Arm("tail-before-map", "rotate-then-map", _TAIL, settings=_tail(64)),
    Arm("tail-long", "four times as many steps", _TAIL, settings=_tail(64, **_AFTER_MAP), longer=4),
    Arm("tail-lora-long", "likewise, no linear branch", _TAIL, settings=_tail(64, linear_branch=False), longer=4),
    Arm("tail-16-long", "likewise", _TAIL, settings=_tail(64, **_AFTER_MAP), smallest_blocks=True, longer=4),
    Arm(
        "tail-error-only",
        "`tail-only`, by what its means get wrong",
        _CHOSEN,
        "salad",
        _ERROR,
        trained=False,
    ),
    Arm("tail-error-16-only", "the same, blocks of 16", _CHOSEN, "salad", _ERROR, 1, True, trained=False),
    Arm("tail-mass", "`tail`, by the mass of cells of 8", _CHOSEN, settings={**_ERROR, "pattern": "mass8"}),
    Arm("tail-error", "`tail`, by what its means get wrong, cells of 8", _CHOSEN, settings=_ERROR),
    Arm("tail-error-16", "`tail-error`, blocks of 16", _CHOSEN, settings=_ERROR, smallest_blocks=True),
    Arm("tail-error-lora", "`tail-error`, no linear branch", _CHOSEN, settings={**_ERROR, "linear_branch": False}),
    Arm(
        "tail-error-lora-16",
        "`tail-error-16`, no linear branch",
        _CHOSEN,
        "salad",
        {**_ERROR, "linear_branch": False},
        1,
        True,
    ),
    Arm("mass-lora", "no means, no branch, by the mass of cells of 8", _CHOSEN, settings=_MASS_LORA),
    Arm("mass-lora-16", "`mass-lora`, blocks of 16", _CHOSEN, settings=_MASS_LORA, smallest_blocks=True),
    Arm(
        "tail-256-128",
        "blocks and means of SaladConfig's defaults",
        _CHOSEN,
        settings=_tail(256, **_AFTER_MAP),
        query_blocks=2,
    ),
    Arm(
        "tail-error-128",
        "`tail-256-128`, by what means get wrong",
        _CHOSEN,
        settings={**_ERROR, "compensation_pool": 256},
        query_blocks=2,
    ),
    Arm("tail-error16", "`tail-error` from cells of 16", _CHOSEN, settings={**_ERROR, "pattern": "error16"}),
    Arm(
        "tail-error16-128",
        "`tail-error-128` from cells of 16",
        _CHOSEN,
        settings={**_ERROR, "pattern": "error16", "compensation_pool": 256},
        query_blocks=2,
    ),
    Arm("tail-error-80", "`tail-error`, sparsity 0.8", _CHOSEN, settings={**_ERROR, "sparsity": 0.8}),
    Arm("tail-error-95", "`tail-error`, sparsity 0.95", _CHOSEN, settings={**_ERROR, "sparsity": 0.95}),
    Arm("tail-error-gate-none", "`tail-error`, no gate", _CHOSEN, settings={**_ERROR, "gate": "none"}),
    Arm(
        "tail-error-16-r64", "`tail-error-16`, LoRA of rank 64", _CHOSEN, "salad", {**_ERROR, "lora_rank": 64}, 1, True
    ),
    Arm("tail-error-long", "`tail-error`, four times the steps", _CHOSEN, settings=_ERROR, longer=4),
    Arm(
        "tail-error-16-long",
        "`tail-error-16`, four times as many steps",
        _CHOSEN,
        settings=_ERROR,
        smallest_blocks=True,
        longer=4,
    ),
    Arm(
        "tail-taught",
        "`tail`, its targets those of the dense model",
        _TAUGHT,
        settings=_tail(64, **_AFTER_MAP),
        teacher=1.0,
    ),
    Arm("tail-half-taught", "half of each target", _TAUGHT, settings=_tail(64, **_AFTER_MAP), teacher=0.5),
    Arm("sparse-lora-taught", "`sparse-lora`, taught", _TAUGHT, settings={"linear_branch": False}, teacher=1.0),
    Arm(
        "sparse-lora-16-taught",
        "the same, blocks of 16",
        _TAUGHT,
        "salad",
        {"linear_branch": False},
        1,
        True,
        teacher=1.0,
    ),
    Arm("tail-lora-taught", "`tail-lora`, taught", _TAUGHT, settings=_tail(64, linear_branch=False), teacher=1.0),
    Arm("tail-error-taught", "`tail-error`, taught", _TAUGHT, settings=_ERROR, teacher=1.0),
    Arm("tail-error-16-taught", "`tail-error-16`, taught", _TAUGHT, settings=_ERROR, smallest_blocks=True, teacher=1.0),
    Arm(
        "tail-error-16-taught-long",
        "four times as many steps",
        _TAUGHT,
        "salad",
        _ERROR,
        1,
        True,
        longer=4,
        teacher=1.0,
    ),
)


class UnknownArmError(ValueError):
    """No arm of that name."""


def arm_named(name: str) -> Arm:
    """Raises UnknownArmError."""
    for arm in ARMS:
        if arm.name == name:
            return arm
    raise UnknownArmError(f"no arm {name!r}. There are: {', '.join(arm.name for arm in ARMS)}.")


def config_of(arm: Arm, preset: Preset) -> salad_compile.SaladConfig:
    """The configuration of a converted arm."""
    block = min(BLOCK_SIZES) if arm.smallest_blocks else preset.block
    given: dict[str, Any] = {
        "sparsity": SPARSITY,
        "query_block": block * arm.query_blocks,
        "key_block": block,
        "rope_placement": "rotate-then-map",
        "lora_rank": preset.rank,
        "min_tokens": 0,
        "compensation": "none",
        **arm.settings,
    }
    return salad_compile.SaladConfig(**given)


def example_inputs(preset: Preset, device: torch.device) -> dict[str, torch.Tensor]:
    """Inputs of the model's forward; only their sizes count."""
    clip = preset.model.clip
    return {
        "hidden_states": torch.zeros(1, 3, clip.frames, clip.edge, clip.edge, device=device),
        "timestep": torch.full((1,), 0.5, device=device),
        "label": torch.zeros(1, dtype=torch.int64, device=device),
    }


def build(arm: Arm, base: VideoDiT, preset: Preset, device: torch.device, seed: int) -> nn.Module:
    """The model that the arm trains, made from `base` in place; the seed draws the new parameters."""
    torch.manual_seed(seed)
    if arm.kind == "dense":
        return add_low_rank(base, preset.rank) if arm.trained else base.requires_grad_(False)
    if arm.kind == "linear":
        return make_linear(base, preset.rank)
    return salad_compile.convert(base, config_of(arm, preset), example_inputs=example_inputs(preset, device))


def drop(arm: Arm, model: nn.Module, preset: Preset, device: torch.device) -> None:
    """Drop the arm's share of the linear branches of a trained model."""
    if arm.drop == 1:  # a projection of zero is pure sparse attention
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".salad.proj_" in name:
                    parameter.zero_()
        return
    clips, labels, noise, level = Batches(preset.tune, preset.model.clip, device)[0]
    noised = clips + level.view(-1, 1, 1, 1, 1) * (noise - clips)
    salad_compile.drop_branches(model, {"hidden_states": noised, "timestep": level, "label": labels}, fraction=arm.drop)


def recipe_of(arm: Arm, preset: Preset, seed: int) -> Recipe:
    """How the arm is trained."""
    return dataclasses.replace(preset.tune, seed=seed, steps=preset.tune.steps * arm.longer, teacher=arm.teacher)


def settings_of(arm: Arm, preset: Preset, seed: int) -> dict[str, Any]:
    """The settings of a row: everything that the result depends on."""
    shared: dict[str, Any] = {
        "kind": arm.kind,
        "trained": arm.trained,
        "tune": dataclasses.asdict(recipe_of(arm, preset, seed)),
        "rank": preset.rank,
        "model": dataclasses.asdict(preset.model),
    }
    if arm.kind == "salad":
        shared["config"] = config_of(arm, preset).to_dict()
        shared["rank"] = shared["config"]["lora_rank"]
    if arm.of:
        shared |= {"of": arm.of, "drop": arm.drop}
    return shared
