"""The settings of a training run: a frozen dataclass that reads and writes JSON and rejects unknown names."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

from salad_compile.common.checks import (
    check_choice,
    check_names,
    checked_names,
    is_count,
    is_int,
    is_number,
    require_mapping,
)
from salad_compile.common.files import read_json
from salad_compile.common.paths import as_path
from salad_compile.config import BackendOptions
from salad_compile.errors import ConfigError

SCHEMA_VERSION = 1

TimestepSampling: TypeAlias = Literal["uniform", "logit-normal", "mode"]
LossWeighting: TypeAlias = Literal["none", "sigma_sqrt", "cosmap"]
CompileMode: TypeAlias = Literal["blocks", "model", "none"]
Precision: TypeAlias = Literal["bf16", "fp32"]
NonFinite: TypeAlias = Literal["raise", "skip"]
OptimizerName: TypeAlias = Literal["adamw", "adamw8bit"]
Tracker: TypeAlias = Literal["tensorboard", "trackio"]

TIMESTEP_SAMPLINGS: tuple[TimestepSampling, ...] = get_args(TimestepSampling)
LOSS_WEIGHTINGS: tuple[LossWeighting, ...] = get_args(LossWeighting)
LARGEST_MODE_SCALE = 2 / (math.pi - 2)  # up to which "mode" draws every noise level
COMPILE_MODES: tuple[CompileMode, ...] = get_args(CompileMode)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
NON_FINITE: tuple[NonFinite, ...] = get_args(NonFinite)
OPTIMIZERS: tuple[OptimizerName, ...] = get_args(OptimizerName)
TRACKERS: tuple[Tracker, ...] = get_args(Tracker)

# Settings that may change when a run is resumed: how long it runs and what it writes, not what a step computes.
MAY_CHANGE = frozenset(
    {
        *("steps", "checkpoint_every", "keep_last", "validation_every", "micro_batch", "gradient_checkpointing"),
        *("compile", "compile_options", "on_non_finite", "workers", "trackers"),
        *("log_every", "sample_every", "sample_steps", "sample_guidance", "sample_items"),
    }
)

_COUNTS = (
    *("sparsity_warmup", "distillation_steps", "validation_every", "warmup_steps", "workers", "seed", "log_every"),
    "sample_every",
)
_POSITIVE_COUNTS = (
    *("steps", "batch", "checkpoint_every", "keep_last", "text_tokens", "validation_points"),
    *("sample_steps", "sample_items"),
)


@checked_names("training setting")
@dataclass(frozen=True)
class TrainSettings:
    """The recipe of a run. Steps and batch are those of arXiv 2601.16515; so is the sparsity, see `SaladConfig`.

    The paper is silent about the rest: each value is our choice, or taken from the code of the trainer named.

    Attributes:
        steps: optimizer steps of the whole run.
        batch: samples of one step, over all processes: micro-batch x processes x accumulation.
        micro_batch: samples of one forward in one process. batch must be a multiple of micro_batch x processes.
        learning_rate: after the warm-up it is constant (DiffSynth-Studio's value).
        warmup_steps: steps over which the learning rate grows linearly (our choice).
        optimizer: "adamw", torch's; "adamw8bit", torchao's, whose moments take a quarter of the memory.
        betas, weight_decay: of AdamW (finetrainers').
        clip: the largest norm of the gradient; larger ones are scaled down (FastVideo's). 0: not clipped.
        flow_shift: shifts the noise levels, s = shift u / (1 + (shift - 1) u) (FastVideo's, DiffSynth-Studio's).
        timestep_sampling: how u is drawn: "uniform"; "logit-normal", a sigmoid of a normal number; or "mode".
        logit_mean, logit_std: of that normal number.
        mode_scale: of "mode", in [-1, 1.75]: above 0, levels in the middle are drawn more often (diffusers').
        loss_weighting: how much a noise level counts: "none", all alike, as the models of all known families were
            trained; "sigma_sqrt" or "cosmap", as in diffusers' `weighting_scheme`. Validation never weighs.
        lowest_noise, highest_noise: the noise levels s that are drawn, of [0, 1]; of an expert of Wan2.2 its own:
            its pipeline's `boundary_ratio` is where one ends and the other begins.
        guidance: that models with an embedding of it are told, as in diffusion-pipe.
        snr_shift_scale: of CogVideoX's noise schedule, as in its pipeline's scheduler: 3 of 2B, 1 of 5B.
        first_frame_conditioning_p: share of samples whose first frame is given: no noise, timestep 0 and no loss
            (LTX-Video-Trainer's name); of Wan2.2-TI2V and LTX-Video, for image to video.
        text_dropout: share of samples whose text is replaced by zeros, for classifier-free guidance (FastVideo's).
        text_tokens: length to which texts are padded with zeros, as the pipeline of Wan does.
        sparsity_warmup: steps in which the sparsity grows from the conversion's `lowest_sparsity` to its own. 0: off.
        distillation_steps: first N steps, which train each site on its own, against its dense output. 0: off.
        teacher: share of the target that is the base model's own prediction for the same input, in [0, 1]; above 0 each
            micro-batch takes a dense forward more. The flow holds noise that nobody can predict, and that prediction
            does not (our choice).
        ema_decay: of an exponential moving average of the trained parameters, saved beside them. 0: off.
        precision: dtype of the frozen base and of what it is given, "bf16" or "fp32". Trained parameters are fp32.
        gradient_checkpointing: through `model.enable_gradient_checkpointing()`, where there is one.
        compile: "blocks": `model.compile_repeated_blocks(backend="salad")`, where there is one; "model" or "none".
        compile_options: options of that backend.
        seed: of everything random.
        on_non_finite: what to do if a loss or gradient is not finite: "raise" or "skip" (the step changes nothing).
        checkpoint_every, keep_last: steps between checkpoints, and how many of them stay.
        validation_every: steps between validations; 0: only at the end.
        validation_points: noise levels for each validation item, spread evenly over u.
        sample_every: steps between sampled clips, dense beside SALAD, beside those of the start and the end; 0: none.
        sample_steps, sample_guidance: of the denoising of such a clip. sample_items: how many clips.
        workers: processes that read ahead, for each training process, beside a thread that draws noise; 0: neither.
        trackers: of accelerate's, beside the log that is always written: "tensorboard", "trackio".
        log_every: steps between lines on stderr where it is no terminal, beside one a minute; 0: none.

    Raises:
        ConfigError: an unknown name, or a value that is not valid.
    """

    steps: int = 1600
    batch: int = 8
    micro_batch: int = 1
    learning_rate: float = 1e-4
    warmup_steps: int = 100
    optimizer: OptimizerName = "adamw"
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 1e-4
    clip: float = 1.0
    flow_shift: float = 5.0
    timestep_sampling: TimestepSampling = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    loss_weighting: LossWeighting = "none"
    lowest_noise: float = 0.0
    highest_noise: float = 1.0
    guidance: float = 1.0
    snr_shift_scale: float = 3.0
    first_frame_conditioning_p: float = 0.0
    text_dropout: float = 0.1
    text_tokens: int = 512
    sparsity_warmup: int = 0
    distillation_steps: int = 0
    teacher: float = 0.0
    ema_decay: float = 0.0
    precision: Precision = "bf16"
    gradient_checkpointing: bool = True
    compile: CompileMode = "blocks"
    compile_options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    on_non_finite: NonFinite = "raise"
    checkpoint_every: int = 100
    keep_last: int = 3
    validation_every: int = 0
    validation_points: int = 4
    sample_every: int = 0
    sample_steps: int = 20
    sample_guidance: float = 1.0
    sample_items: int = 1
    workers: int = 2
    trackers: tuple[Tracker, ...] = ()
    log_every: int = 0

    def __post_init__(self) -> None:
        for name in ("betas", "trackers"):  # JSON has lists
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        self._check_counts()
        self._check_numbers()
        check_choice("timestep_sampling", self.timestep_sampling, TIMESTEP_SAMPLINGS)
        check_choice("loss_weighting", self.loss_weighting, LOSS_WEIGHTINGS)
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("compile", self.compile, COMPILE_MODES)
        check_choice("on_non_finite", self.on_non_finite, NON_FINITE)
        check_choice("gradient_checkpointing", self.gradient_checkpointing, (False, True))
        held = _fits_json(self.compile_options)
        _require(held, "compile_options", "a dictionary of values that JSON can hold", self.compile_options)
        BackendOptions.from_options(self.compile_options)  # else its mistakes show in the first forward
        _require(isinstance(self.trackers, tuple), "trackers", "a list of names", self.trackers)
        for tracker in self.trackers:
            check_choice("trackers", tracker, TRACKERS)

    def _check_counts(self) -> None:
        for name in (*_COUNTS, *_POSITIVE_COUNTS, "micro_batch"):
            value, least = getattr(self, name), 0 if name in _COUNTS else 1
            # a seed goes into a digest, as text: it may be as large as others draw theirs
            good = is_int(value) and value >= least if name == "seed" else is_count(value, least)
            _require(good, name, f"a whole number of at least {least}, at most 2**53", value)
        if self.batch % self.micro_batch:
            raise ConfigError(f"batch ({self.batch}) must be a multiple of micro_batch ({self.micro_batch}).")

    def _check_numbers(self) -> None:
        def within(name: str, low: float, high: float, text: str) -> None:
            value = getattr(self, name)
            _require(is_number(value) and low <= value < high, name, text, value)

        within("learning_rate", 0.0, 1e30, "a number of at least 0")  # larger ones overflow in fp32
        within("weight_decay", 0.0, float("inf"), "a number of at least 0")
        within("clip", 0.0, float("inf"), "a number of at least 0")
        within("flow_shift", 1e-9, float("inf"), "a number above 0")
        within("logit_mean", float("-inf"), float("inf"), "a number")
        within("logit_std", 0.0, float("inf"), "a number of at least 0")
        within("mode_scale", -1.0, LARGEST_MODE_SCALE, "a number in [-1, 1.75]")
        within("lowest_noise", 0.0, 1.0, "a noise level in [0, 1)")
        within("highest_noise", 0.0, 1.0 + 1e-12, "a noise level in (0, 1]")
        _require(self.lowest_noise < self.highest_noise, "lowest_noise", "below highest_noise", self.lowest_noise)
        within("guidance", 0.0, float("inf"), "a number of at least 0")
        within("snr_shift_scale", 1e-9, float("inf"), "a number above 0")
        within("sample_guidance", 0.0, float("inf"), "a number of at least 0")
        within("first_frame_conditioning_p", 0.0, 1.0 + 1e-12, "a share in [0, 1]")
        within("teacher", 0.0, 1.0 + 1e-12, "a share in [0, 1]")
        within("text_dropout", 0.0, 1.0 + 1e-12, "a share in [0, 1]")
        within("ema_decay", 0.0, 1.0, "a number in [0, 1)")
        pair = isinstance(self.betas, tuple) and len(self.betas) == 2
        good = pair and all(is_number(beta) and 0 <= beta < 1 for beta in self.betas)
        _require(good, "betas", "two numbers in [0, 1)", self.betas)

    def to_dict(self) -> dict[str, Any]:
        """A dictionary that JSON can hold."""
        return {"schema_version": SCHEMA_VERSION, **json.loads(json.dumps(dataclasses.asdict(self)))}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainSettings:
        """Inverse of :meth:`to_dict`; what is not given has its default.

        Raises:
            ConfigError: an unknown name, another schema version, or a value that is not valid.
        """
        require_mapping(values, "training settings")
        given = dict(values)
        version = given.pop("schema_version", SCHEMA_VERSION)
        if version != SCHEMA_VERSION:
            raise ConfigError(
                f"settings of schema version {version!r}: this release of salad_compile reads {SCHEMA_VERSION}."
            )
        check_names(cls, given, "training setting")
        return cls(**given)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> TrainSettings:
        """The settings in a JSON file.

        Raises:
            ConfigError: not a JSON object, or see :meth:`from_dict`. FileNotFoundError: no file.
        """
        return cls.from_dict(read_json(as_path(path)))

    def with_changes(self, changes: Mapping[str, Any]) -> TrainSettings:
        """A copy with other values.

        Raises:
            ConfigError: see :meth:`from_dict`.
        """
        return self.from_dict({**self.to_dict(), **changes})


def _fits_json(value: object) -> bool:
    """Whether it is a dictionary that a checkpoint can hold: JSON has no NaN, and knows no other kinds of objects."""
    try:
        return isinstance(value, dict) and bool(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        return False


def _require(condition: bool, name: str, expected: str, value: object) -> None:
    if not condition:
        raise ConfigError(f"{name} must be {expected}, got {value!r}.")
