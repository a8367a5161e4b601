"""What a user can choose: frozen dataclasses that read and write JSON and reject what they do not know."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from .errors import ConfigError, did_you_mean

PATTERNS = ("topk",)
TOKEN_ORDERS = ("tiles", "flat")
FEATURE_MAPS = ("relu", "elu", "softmax")
BLOCK_SIZES = (16, 32, 64, 128, 256)
PROJECTIONS = ("query", "key", "value", "out")
LOWERINGS = ("inductor", "aot_eager", "eager")

# arXiv 2601.16515 trains at about 90 % sparsity. Without training there is nothing that repairs the quality, hence the
# cautious default for models that were never converted (our choice).
TRAINED_SPARSITY = 0.9
TRAINING_FREE_SPARSITY = 0.5
# Our choice (method.md 4.4). On an H100 the whole operator is ahead from 5,120 tokens on (docs/kernels.md), by the
# device's time alone; the margin is for the host's.
MIN_TOKENS = 8192


def density_permille(sparsity: float) -> int:
    """Blocks to keep per thousand. Integer, because in floating point (1 - 0.9) * 10 is below 1 (method.md 4.2)."""
    return round(1000 * (1 - sparsity))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_sparsity(value: object) -> None:
    _require(
        isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1,
        f"sparsity is the share of attention that is left out: a number in [0, 1), got {value!r}. "
        "0 computes everything, 0.9 computes a tenth.",
    )


def _check_choice(name: str, value: object, valid: tuple[Any, ...]) -> None:
    hint = did_you_mean(value, valid) if isinstance(value, str) else ""
    fits = type(value) is type(valid[0]) and value in valid  # 128.0 equals 128, and is no block size
    _require(fits, f"{name} must be one of {', '.join(map(repr, valid))}, got {value!r}.{hint}")


def _check_attention_options(options: SaladConfig | BackendOptions) -> None:
    """The checks that conversion and training-free compilation share."""
    _check_sparsity(options.sparsity)
    _check_choice("pattern", options.pattern, PATTERNS)
    _check_choice("query_block", options.query_block, BLOCK_SIZES)
    _check_choice("key_block", options.key_block, BLOCK_SIZES)  # powers of two: one of the sizes divides the other
    _require(
        _is_int(options.min_tokens) and options.min_tokens >= 0,
        f"min_tokens is a number of tokens, 0 or more, got {options.min_tokens!r}.",
    )


def check_names(cls: type, given: Mapping[str, Any], what: str) -> None:
    """Reject names that the dataclass `cls` does not have, naming the nearest valid one."""
    valid = [field.name for field in dataclasses.fields(cls) if field.init]
    for name in given:
        _require(name in valid, f"unknown {what} {name!r}.{did_you_mean(name, valid)} Valid: {', '.join(valid)}.")


@dataclass(frozen=True)
class AttentionSpec:
    """What one attention site computes, without its parameters: the part of the configuration that a graph depends on.

    It travels through traced graphs as one short string, so that sites with equal settings share one compiled graph.

    The first six are the user's; the others describe the site. text: where the text of a joint sequence lies, "none",
    "before" or "after" the video, or "prefix": before the video, among keys and values only. single: whether video and
    text come through one projection. groups: query heads that share one key head. square_mask: whether a (B, 1, S, S)
    mask was seen to be key padding.
    """

    pattern: str
    permille: int
    query_block: int
    key_block: int
    feature_map: str
    token_order: str = "flat"
    text: str = "none"
    single: bool = False
    groups: int = 1
    square_mask: bool = False

    def encode(self) -> str:
        return "|".join(str(getattr(self, field.name)) for field in dataclasses.fields(self))

    @classmethod
    @lru_cache(maxsize=256)
    def decode(cls, text: str) -> AttentionSpec:
        pattern, permille, query_block, key_block, feature_map, order, segment, single, groups, square = text.split("|")
        sizes = (int(permille), int(query_block), int(key_block))
        return cls(
            pattern, *sizes, feature_map, order, segment, single == "True", int(groups), square_mask=square == "True"
        )


@dataclass(frozen=True)
class SaladConfig:
    """How :func:`salad_compile.convert` converts a model.

    Attributes:
        sparsity: share of key blocks that a query block leaves out, in [0, 1). 0.9 as in arXiv 2601.16515.
        pattern: how blocks are selected: "topk" keeps the best by mean-pooled scores, per head and query block.
        query_block: tokens per query block.
        key_block: tokens per key block. One of the two sizes divides the other; no length has to be divisible by them.
        feature_map: feature map of the linear branch: "relu" (the paper), "elu" (elu + 1) or "softmax".
        lora_rank: rank of the low-rank update of the projections; 0 adds none. 64 is our choice, the paper is silent.
        lora_alpha: the update is scaled by lora_alpha / lora_rank; None means lora_rank, a scale of 1.
        lora_targets: the projections that get an update, a subset of ("query", "key", "value", "out").
        min_tokens: attention over fewer tokens than this stays dense.
        token_order: the order whose consecutive runs are the blocks: "tiles", compact pieces of the video's token grid
            where it is known, or "flat", the model's own order.
        train_base: leave the base parameters as they are instead of freezing them.

    Raises:
        ConfigError: a value is out of range or of the wrong kind.
    """

    sparsity: float = TRAINED_SPARSITY
    pattern: str = "topk"
    query_block: int = 128
    key_block: int = 64
    feature_map: str = "relu"
    lora_rank: int = 64
    lora_alpha: float | None = None
    lora_targets: tuple[str, ...] = PROJECTIONS
    min_tokens: int = MIN_TOKENS
    token_order: str = "tiles"
    train_base: bool = False

    def __post_init__(self) -> None:
        _check_attention_options(self)
        _check_choice("token_order", self.token_order, TOKEN_ORDERS)
        _check_choice("feature_map", self.feature_map, FEATURE_MAPS)
        _require(
            _is_int(self.lora_rank) and self.lora_rank >= 0, f"lora_rank must be 0 or more, got {self.lora_rank!r}."
        )
        _require(
            self.lora_alpha is None or (isinstance(self.lora_alpha, (int, float)) and self.lora_alpha > 0),
            f"lora_alpha must be a positive number or None, got {self.lora_alpha!r}.",
        )
        _require(
            not isinstance(self.lora_targets, str),
            f"lora_targets is a tuple of names, got the string {self.lora_targets!r}: write ({self.lora_targets!r},).",
        )
        object.__setattr__(self, "lora_targets", tuple(self.lora_targets))
        for target in self.lora_targets:
            _check_choice("each of lora_targets", target, PROJECTIONS)
        _require(isinstance(self.train_base, bool), f"train_base must be True or False, got {self.train_base!r}.")

    @property
    def lora_scale(self) -> float:
        """Factor of the low-rank update: alpha / rank."""
        return (self.lora_alpha or self.lora_rank) / self.lora_rank if self.lora_rank else 0.0

    @property
    def spec(self) -> AttentionSpec:
        """The part of the configuration that a traced graph depends on."""
        blocks = (self.query_block, self.key_block)
        return AttentionSpec(self.pattern, density_permille(self.sparsity), *blocks, self.feature_map, self.token_order)

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold."""
        return {**dataclasses.asdict(self), "lora_targets": list(self.lora_targets)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SaladConfig:
        """Raises ConfigError for an unknown key or a wrong value."""
        check_names(cls, values, "configuration key")
        return cls(**values)

    def difference(self, other: SaladConfig) -> str:
        """`name: ours != theirs` for each field that differs, or the empty string."""
        pairs = ((f.name, getattr(self, f.name), getattr(other, f.name)) for f in dataclasses.fields(self))
        return ", ".join(f"{name}: {ours!r} != {theirs!r}" for name, ours, theirs in pairs if ours != theirs)


@dataclass(frozen=True)
class BackendOptions:
    """`options=` of `torch.compile(model, backend="salad", options={...})`.

    The first five apply to models that were never converted (training-free block-sparse attention). A converted model
    carries its own sparsity, pattern and blocks, and giving other values for them is an error; its sites are chosen
    already, so min_tokens does nothing. All names are those of :class:`SaladConfig`.

    Attributes:
        sparsity, pattern, query_block, key_block, min_tokens: see :class:`SaladConfig`; sparsity defaults to 0.5 here.
        strict: for a converted model: a site that does not run as SALAD is an error (True) or a warning (False).
        lowering: what compiles the rewritten graph: "inductor", "aot_eager" or "eager".
        inductor: configuration patches for Inductor, as `torch._inductor.config` names them.

    Raises:
        ConfigError: a value is out of range or of the wrong kind.
    """

    sparsity: float = TRAINING_FREE_SPARSITY
    pattern: str = "topk"
    query_block: int = 128
    key_block: int = 64
    min_tokens: int = MIN_TOKENS
    strict: bool = True
    lowering: str = "inductor"
    inductor: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    given: frozenset[str] = dataclasses.field(default=frozenset(), init=False, compare=False)

    def __post_init__(self) -> None:
        _check_attention_options(self)
        _require(isinstance(self.strict, bool), f"strict must be True or False, got {self.strict!r}.")
        _check_choice("lowering", self.lowering, LOWERINGS)
        _require(
            isinstance(self.inductor, Mapping), f"inductor is a dictionary of Inductor options, got {self.inductor!r}."
        )

    @property
    def spec(self) -> AttentionSpec:
        """The part of the options that a traced graph depends on; the linear branch is absent, so its map is unused."""
        return AttentionSpec(
            self.pattern, density_permille(self.sparsity), self.query_block, self.key_block, FEATURE_MAPS[0]
        )

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None) -> BackendOptions:
        """Raises ConfigError for an unknown key or a wrong value."""
        given = dict(options or {})
        check_names(cls, given, "option")
        made = cls(**given)
        object.__setattr__(made, "given", frozenset(given))
        return made
