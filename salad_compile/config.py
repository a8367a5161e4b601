"""What a user can choose: frozen dataclasses that read and write JSON and reject what they do not know."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from os import PathLike
from typing import Any, Literal, TypeAlias, get_args

from salad_compile.common.checks import (
    LARGEST_SIZE,
    check_choice,
    check_names,
    checked_names,
    is_count,
    is_number,
    require,
)
from salad_compile.definition import patterns
from salad_compile.definition.spec import (
    BLOCK_SIZES,
    COMPENSATIONS,
    FEATURE_MAPS,
    GATES,
    SCALINGS,
    TOKEN_ORDERS,
    AttentionSpec,
    Compensation,
    FeatureMap,
    Gate,
    Scaling,
    TokenOrder,
    density_permille,
)

RopePlacement: TypeAlias = Literal["auto", "map-then-rotate", "rotate-then-map"]
Projection: TypeAlias = Literal["query", "key", "value", "out"]
Lowering: TypeAlias = Literal["inductor", "aot_eager", "eager"]

ROPE_PLACEMENTS: tuple[RopePlacement, ...] = get_args(RopePlacement)
OVERRIDES = ("sparsity", "pattern", "linear_branch")
PROJECTIONS: tuple[Projection, ...] = get_args(Projection)
LOWERINGS: tuple[Lowering, ...] = get_args(Lowering)

# arXiv 2601.16515 trains at about 90 % sparsity. Without training there is nothing that repairs the quality, hence the
# cautious default for models that were never converted (our choice).
TRAINED_SPARSITY = 0.9
TRAINING_FREE_SPARSITY = 0.5
# Our choice (specification 4.4). On an H100 the whole operator is ahead from 5,120 tokens on (docs/kernels.md), by the
# device's time alone; the margin is for the host's.
MIN_TOKENS = 8192
COMPENSATION_POOL = 256
# "error8" closes more of the gap at each length that was measured (docs/method.md); its time there is not known.
PATTERN = "topk"
TRAINING_FREE_COMPENSATION: Compensation = "tail"


def _check_sparsity(value: object) -> None:
    require(
        is_number(value) and 0 <= value < 1,
        f"sparsity is the share of attention that is left out: a number in [0, 1), got {value!r}. "
        "0 computes everything, 0.9 computes a tenth.",
    )


def _check_attention_options(options: SaladConfig | BackendOptions) -> None:
    """The checks that conversion and training-free compilation share."""
    _check_sparsity(options.sparsity)
    check_choice("pattern", options.pattern, patterns.names())
    check_choice("query_block", options.query_block, BLOCK_SIZES)
    check_choice("key_block", options.key_block, BLOCK_SIZES)  # powers of two: one of the sizes divides the other
    check_choice("compensation", options.compensation, COMPENSATIONS)
    pool, block = options.compensation_pool, options.key_block
    require(
        is_count(pool, 1, LARGEST_SIZE) and (pool % block == 0 or block % pool == 0),
        f"compensation_pool is a number of tokens below 2**31, and it or key_block ({block}) divides the other, got "
        f"{pool!r}.",
    )
    require(
        is_count(options.min_tokens),
        f"min_tokens is a number of tokens, 0 or more and at most 2**53, got {options.min_tokens!r}.",
    )


def _pool(options: SaladConfig | BackendOptions) -> int:
    """Tokens for which one mean stands; 0 without compensation, whose size then is in no graph."""
    return options.compensation_pool if options.compensation != COMPENSATIONS[0] else 0


@checked_names("setting")
@dataclass(frozen=True)
class SaladConfig:
    """How :func:`salad_compile.convert` converts a model.

    Attributes:
        sparsity: share of key blocks that a query block leaves out, in [0, 1). 0.9 as in arXiv 2601.16515.
        pattern: how blocks are selected. "topk" keeps the best by mean-pooled scores, per head and query block. "stswa"
            gives each head a sliding window, over the frames' tokens one frame after another (even heads) or over the
            positions' tokens through time (odd heads); it needs the token grid. :func:`salad_compile.calibrate_heads`
            chooses per head by measurement. "mass8" and "mass16" keep the blocks with most of the softmax, as means of
            8 or 16 tokens tell it, "error8" and "error16" those of which compensation would get most wrong.
        query_block: tokens per query block.
        key_block: tokens per key block. One of the two sizes divides the other; no length has to be divisible by them.
        window: with "stswa", the reach of the window on either side in tokens. None: what gives `sparsity`.
        compensation: what stands for the key blocks that a query block leaves out. "none": nothing, as in the paper.
            "tail" (our choice): means of their keys and values, in the same softmax, and a learned log-weight for each
            head (specification 4.6); for a little more work it keeps most of what sparsity loses.
        compensation_pool: tokens for which one mean stands; it or `key_block` divides the other.
        linear_branch: whether there is a linear branch; without it a site is sparse attention and LoRA.
        feature_map: feature map of the linear branch: "relu" (the paper), "elu" (elu + 1) or "softmax".
        rope_placement: "map-then-rotate": the model's own position encoding is applied again, to the features of the
            query and the key before position (arXiv 2509.24695). "rotate-then-map": the linear branch sees query and
            key as they reach softmax attention. "auto": the first wherever the encoding can be told from the rest of
            the forward, else the second (our choice, docs/method.md).
        gate: "token": one sigmoid gate per token (the paper); "head": one per token and head; "none": no gate.
        scaling: "v1": the gate alone. "v2", our reading of the second version of the paper: learned scales of the layer
            and of each head, times the gate.
        lora_rank: rank of the low-rank update of the projections; 0 adds none. 64 is our choice, the paper is silent.
        lora_alpha: the update is scaled by lora_alpha / lora_rank; None means lora_rank, a scale of 1.
        lora_targets: the projections that get an update, a subset of ("query", "key", "value", "out").
        min_tokens: attention over fewer tokens than this stays dense.
        dense_layers: as many eligible sites, from the first, stay dense.
        overrides: glob of site names -> settings of those sites: "sparsity", "pattern", "linear_branch". Of several
            globs that match, the last counts.
        lowest_sparsity: the lowest that :func:`salad_compile.set_sparsity` will ask for, without compiling again.
            None: the sparsity cannot be changed after conversion.
        token_order: the order whose consecutive runs are the blocks: "tiles", compact pieces of the video's token grid
            where it is known, or "flat", the model's own order.
        train_base: leave the base parameters as they are instead of freezing them.

    Raises:
        ConfigError: an unknown name, or a value out of range or of the wrong kind.
    """

    sparsity: float = TRAINED_SPARSITY
    pattern: str = PATTERN  # others can be registered
    query_block: int = 128
    key_block: int = 64
    window: int | None = None
    compensation: Compensation = "tail"
    compensation_pool: int = COMPENSATION_POOL
    linear_branch: bool = True
    feature_map: FeatureMap = "relu"
    rope_placement: RopePlacement = ROPE_PLACEMENTS[0]
    gate: Gate = GATES[0]
    scaling: Scaling = SCALINGS[0]
    lora_rank: int = 64
    lora_alpha: float | None = None
    lora_targets: tuple[Projection, ...] = PROJECTIONS
    min_tokens: int = MIN_TOKENS
    dense_layers: int = 0
    overrides: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    lowest_sparsity: float | None = None
    token_order: TokenOrder = "tiles"
    train_base: bool = False

    def __post_init__(self) -> None:
        _check_attention_options(self)
        check_choice("token_order", self.token_order, TOKEN_ORDERS)
        check_choice("feature_map", self.feature_map, FEATURE_MAPS)
        check_choice("rope_placement", self.rope_placement, ROPE_PLACEMENTS)
        check_choice("gate", self.gate, GATES)
        check_choice("scaling", self.scaling, SCALINGS)
        self._check_schedule()
        require(is_count(self.lora_rank), f"lora_rank must be a whole number, 0 or more, got {self.lora_rank!r}.")
        require(
            self.lora_alpha is None or (is_number(self.lora_alpha) and self.lora_alpha > 0),
            f"lora_alpha must be a positive number or None, got {self.lora_alpha!r}.",
        )
        require(
            not isinstance(self.lora_targets, str),
            f"lora_targets is a tuple of names, got the string {self.lora_targets!r}: write ({self.lora_targets!r},).",
        )
        require(
            isinstance(self.lora_targets, (tuple, list)),  # a set has another order in each process
            f"lora_targets is a tuple of names, of {', '.join(map(repr, PROJECTIONS))}, got {self.lora_targets!r}.",
        )
        object.__setattr__(self, "lora_targets", tuple(self.lora_targets))
        for target in self.lora_targets:
            check_choice("each of lora_targets", target, PROJECTIONS)
        require(isinstance(self.train_base, bool), f"train_base must be True or False, got {self.train_base!r}.")
        require(
            isinstance(self.linear_branch, bool), f"linear_branch must be True or False, got {self.linear_branch!r}."
        )

    def _check_schedule(self) -> None:
        """The settings that differ between sites, or change after conversion."""
        require(
            self.window is None or is_count(self.window, 1, LARGEST_SIZE),
            f"window is a number of tokens, 1 or more and below 2**31, or None, got {self.window!r}.",
        )
        require(
            is_count(self.dense_layers),
            f"dense_layers is a number of sites, 0 or more, got {self.dense_layers!r}.",
        )
        require(
            isinstance(self.overrides, Mapping)
            and all(isinstance(k, str) and isinstance(v, Mapping) for k, v in self.overrides.items()),
            f'overrides maps globs of site names to settings, {{"blocks.0.*": {{"sparsity": 0.5}}}}, got '
            f"{self.overrides!r}.",
        )
        object.__setattr__(self, "overrides", {glob: dict(given) for glob, given in self.overrides.items()})
        for given in self.overrides.values():
            for name in given:
                check_choice("each setting of overrides", name, OVERRIDES)
            dataclasses.replace(self, overrides={}, **given)  # checks the values
        if self.lowest_sparsity is not None:
            _check_sparsity(self.lowest_sparsity)
            for sparsity in self.sparsities():
                require(
                    self.lowest_sparsity <= sparsity,
                    f"lowest_sparsity ({self.lowest_sparsity}) is above a sparsity that the sites start with "
                    f"({sparsity}).",
                )

    def sparsities(self) -> list[float]:
        """Every sparsity that a site may start with."""
        return [self.sparsity, *(given["sparsity"] for given in self.overrides.values() if "sparsity" in given)]

    def of_site(self, name: str) -> SaladConfig:
        """The configuration of one site, overrides applied; `overrides` itself stays."""
        chosen: dict[str, Any] = {}
        for glob, given in self.overrides.items():
            if fnmatchcase(name, glob):
                chosen.update(given)
        return dataclasses.replace(self, **chosen) if chosen else self

    @property
    def lora_scale(self) -> float:
        """Factor of the low-rank update: alpha / rank."""
        return (self.lora_alpha or self.lora_rank) / self.lora_rank if self.lora_rank else 0.0

    @property
    def spec(self) -> AttentionSpec:
        """The part of the configuration that a traced graph depends on."""
        sparsities = self.sparsities()
        adjustable = self.lowest_sparsity is not None or len(set(sparsities)) > 1
        lowest = min([*sparsities, *([] if self.lowest_sparsity is None else [self.lowest_sparsity])])
        return AttentionSpec(
            self.pattern,
            density_permille(lowest),
            self.query_block,
            self.key_block,
            self.feature_map,
            self.token_order,
            linear_branch=self.linear_branch,
            rope_placement="map-then-rotate" if self.rope_placement == "auto" else self.rope_placement,
            gate=self.gate,
            scaling=self.scaling,
            adjustable=adjustable,
            window=self.window or 0,
            compensation=self.compensation,
            pool=_pool(self),
        )

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
        pairs = ((name, getattr(self, name), getattr(other, name)) for name in self.different(other))
        return ", ".join(f"{name}: {ours!r} != {theirs!r}" for name, ours, theirs in pairs)

    def different(self, other: SaladConfig) -> list[str]:
        """The fields that differ, without those that mean nothing in either: their defaults were others before."""
        idle = {"compensation_pool"} if self.compensation == other.compensation == COMPENSATIONS[0] else set()
        names = (field.name for field in dataclasses.fields(self))
        return [name for name in names if name not in idle and getattr(self, name) != getattr(other, name)]


@checked_names("option")
@dataclass(frozen=True)
class BackendOptions:
    """`options=` of `torch.compile(model, backend="salad", options={...})`.

    The first seven apply to models that were never converted (training-free block-sparse attention). A converted model
    carries its own sparsity, pattern and blocks, and giving other values for them is an error; its sites are chosen
    already, so min_tokens does nothing. All names are those of :class:`SaladConfig`.

    Attributes:
        sparsity, pattern, query_block, key_block, compensation, compensation_pool, min_tokens: see
            :class:`SaladConfig`; sparsity defaults to 0.5 here, compensation to "tail", and a head's log-weight is 0.
        strict: for a converted model: a site that does not run as SALAD is an error (True) or a warning (False).
        lowering: what compiles the rewritten graph: "inductor", "aot_eager" or "eager".
        inductor: configuration patches for Inductor, as `torch._inductor.config` names them.
        dump_graphs: a folder; each graph gets a folder in it with the graph as captured and after each of our passes.
        prepare_operands: whether graphs of converted models compute norm, position and features of a query or key in
            one kernel of ours where its form is known (docs/kernels.md), instead of leaving them to `lowering`. "auto":
            on a GPU, where it is the faster one, in inference. On the CPU what `lowering` makes of them is faster. Also
            whether the move of values into token order leaves their means for compensation; "auto": on a GPU.
        spare_memory: whether training computes again in the backward pass what is cheap (docs/architecture.md), and so
            keeps no more of a block than dense attention does. False: it is kept, which takes a little less time.

    Raises:
        ConfigError: an unknown name, or a value out of range or of the wrong kind.
    """

    sparsity: float = TRAINING_FREE_SPARSITY
    pattern: str = PATTERN
    query_block: int = 128
    key_block: int = 64
    compensation: Compensation = TRAINING_FREE_COMPENSATION
    compensation_pool: int = COMPENSATION_POOL
    min_tokens: int = MIN_TOKENS
    strict: bool = True
    lowering: Lowering = "inductor"
    inductor: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    dump_graphs: str | PathLike[str] | None = None
    prepare_operands: bool | Literal["auto"] = "auto"
    spare_memory: bool = True
    given: frozenset[str] = dataclasses.field(default=frozenset(), init=False, compare=False)

    def __post_init__(self) -> None:
        _check_attention_options(self)
        reason = patterns.find(self.pattern).needs_conversion()
        require(not reason, f'pattern "{self.pattern}" cannot run without conversion: {reason}.')
        for name in ("strict", "spare_memory"):
            value = getattr(self, name)
            require(isinstance(value, bool), f"{name} must be True or False, got {value!r}.")
        asked = self.prepare_operands
        prepares = isinstance(asked, bool) or (isinstance(asked, str) and asked == "auto")
        require(prepares, f'prepare_operands must be True, False or "auto", got {asked!r}.')
        check_choice("lowering", self.lowering, LOWERINGS)
        require(
            isinstance(self.inductor, Mapping), f"inductor is a dictionary of Inductor options, got {self.inductor!r}."
        )
        require(
            self.dump_graphs is None or isinstance(self.dump_graphs, (str, PathLike)),
            f"dump_graphs is the path of a folder, got {self.dump_graphs!r}.",
        )

    @property
    def spec(self) -> AttentionSpec:
        """The part of the options that a traced graph depends on; the linear branch is absent, so its map is unused."""
        return AttentionSpec(
            self.pattern,
            density_permille(self.sparsity),
            self.query_block,
            self.key_block,
            FEATURE_MAPS[0],
            compensation=self.compensation,
            pool=_pool(self),
        )

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None) -> BackendOptions:
        """Raises ConfigError for an unknown key or a wrong value."""
        check_names(cls, options or {}, "option")
        given = dict(options or {})
        made = cls(**given)
        object.__setattr__(made, "given", frozenset(given))
        return made
