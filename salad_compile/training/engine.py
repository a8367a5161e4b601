"""accelerate as the engine: one process, DDP or FSDP2, as its launcher says; and what is compiled."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from salad_compile.backend.pipelines import compile_blocks
from salad_compile.common.logs import logger
from salad_compile.common.sharding import mean_like, reshard
from salad_compile.errors import ConfigError, MissingPackageError
from salad_compile.training.optimizers import make_optimizer, set_rate
from salad_compile.training.settings import TrainSettings
from salad_compile.training.tensors import trained_parameters


def make_accelerator(settings: TrainSettings, directory: Path) -> Any:
    """An `accelerate.Accelerator` for this process, as `accelerate launch` configured it by its environment.

    accelerate does not handle precision here: the base has one dtype and the branches fp32 (preparation.py), and an
    autocast around them would only take the fp32 of the base's norms and embeddings away.

    Raises:
        MissingPackageError: accelerate is not installed. ConfigError: an engine that this trainer does not support.
    """
    try:
        from accelerate import Accelerator  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingPackageError('training needs accelerate: pip install "salad-compile[train]"') from error
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision="no",
        log_with=list(settings.trackers) or None,
        project_dir=str(directory),
    )
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != asked:
        raise ConfigError(
            f"the launcher started {asked} processes, and accelerate knows of {accelerator.num_processes}: its state "
            "was made before this process was. Make no Accelerator before training processes are forked."
        )
    kind = accelerator.distributed_type.value
    if kind in ("DEEPSPEED", "MEGATRON_LM", "XLA", "TP") or (kind == "FSDP" and not accelerator.is_fsdp2):
        raise ConfigError(f"accelerate was configured for {kind}: this trainer runs on one process, DDP or FSDP2.")
    if accelerator.is_fsdp2 and accelerator.state.fsdp_plugin.cpu_ram_efficient_loading:
        # accelerate 1.15 reads the mesh of every entry of the state dict, and our buffers are not sharded
        logger.info("FSDP2 without cpu_ram_efficient_loading: it does not work for models with persistent buffers")
        accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = False
    return accelerator


@dataclass
class Engine:
    """A model prepared for training.

    Attributes:
        bare: the module itself, sharded in place by FSDP2. wrapped: what the training forward calls.
        optimizer: accelerate's. parameters: the trained ones by name, sharded by FSDP2.
    """

    accelerator: Any
    settings: TrainSettings
    bare: nn.Module
    wrapped: nn.Module
    optimizer: Any
    checkpoints_activations: bool = False

    @classmethod
    def prepare(cls, accelerator: Any, model: nn.Module, settings: TrainSettings) -> Engine:
        """Distribute a model that :func:`make_trainable` has prepared."""
        _broadcast(accelerator, model)
        optimizer = make_optimizer(trained_parameters(model).values(), settings, sharded=accelerator.is_fsdp2)
        engine = cls(accelerator, settings, model, model, optimizer)
        if not settings.distillation_steps:
            engine.checkpoint_activations()
        engine.compile()  # before it is distributed: afterwards graphs would break at every collective
        engine.wrapped, engine.optimizer = accelerator.prepare(model, optimizer)
        engine.bare = accelerator.unwrap_model(engine.wrapped)
        return engine

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Those that the optimizer steps: also after a forward without a backward pass, the shards."""
        reshard(self.bare)
        return trained_parameters(self.bare)

    def checkpoint_activations(self) -> None:
        """Gradient checkpointing if the settings say so; a second call does nothing."""
        if not self.settings.gradient_checkpointing or self.checkpoints_activations:
            return
        self.checkpoints_activations = True
        model: Any = self.bare
        if hasattr(model, "enable_gradient_checkpointing"):
            model.enable_gradient_checkpointing()
        else:
            logger.warning("%s has no enable_gradient_checkpointing(): trains without", _name_of(model))

    def compile(self) -> None:
        """Mark for compilation what the settings say; the first forward compiles."""
        settings, model = self.settings, self.bare
        if settings.compile == "none":
            return
        options = {"options": settings.compile_options} if settings.compile_options else {}
        if settings.compile == "model":
            model.compile(backend="salad", **options)
        elif not compile_blocks(model, options):
            logger.warning(
                '%s has no compile_repeated_blocks(): trains uncompiled; compile="model" compiles it', _name_of(model)
            )

    def set_gradients(self, gradients: Mapping[str, torch.Tensor]) -> None:
        """Take the mean over the processes as the gradients of the parameters, sharded as they are.

        Args:
            gradients: by name, of this process alone and whole; of the same parameters in every process.
        """
        for name, parameter in self.parameters.items():
            gradient = gradients.get(name)
            if gradient is not None and self.accelerator.is_fsdp2:
                gradient = mean_like(gradient, parameter)
            elif gradient is not None and self.accelerator.num_processes > 1:
                gradient = self.accelerator.reduce(gradient, "mean")
            parameter.grad = gradient

    def set_learning_rate(self, step: int) -> float:
        """Of step number `step`, counted from 0: a linear warm-up, then constant."""
        warmup = self.settings.warmup_steps
        rate = self.settings.learning_rate * (min(1.0, (step + 1) / warmup) if warmup else 1.0)
        set_rate(self.optimizer, rate)
        return rate

    def clip(self) -> float:
        """Scale the gradients down to the largest norm; the norm before that."""
        limit = self.settings.clip or float("inf")
        return float(self.accelerator.clip_grad_norm_(list(self.parameters.values()), limit))


def _name_of(model: nn.Module) -> str:
    return type(model).__name__.removeprefix("FSDP")  # FSDP2 puts a generated subclass in front of it


def _broadcast(accelerator: Any, model: nn.Module) -> None:
    """Branches as process 0 has them: LoRA starts random, and FSDP2 would shard what every process drew for itself."""
    if accelerator.num_processes == 1:
        return
    from accelerate.utils import broadcast  # type: ignore[import-untyped]

    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter.copy_(broadcast(parameter.detach().to(accelerator.device)))
