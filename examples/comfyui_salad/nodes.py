"""The nodes: Load SALAD, SALAD settings, Compile with SALAD.

Each takes a MODEL and returns a clone of it; the MODEL that came in, and others made from the same checkpoint, stay as
they are. A node that raises has changed nothing.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

import salad_compile
from salad_compile.errors import (
    AlreadyConvertedError,
    BaseModelMismatchError,
    ConfigError,
    NotASaladFileError,
    NotConvertedError,
    SaladError,
)

from .patching import diffusion_model_of, release, require_unpatched, salad_in, use_instead, weights_dtype
from .rotation import plain_rotation
from .steering import KEY, Settings, steer
from .wan import example_inputs, require_wan

CATEGORY = "SALAD"
FOLDER = "salad"  # of ComfyUI's `models`


class LoadSalad:
    """MODEL + file -> MODEL."""

    CATEGORY = CATEGORY
    DESCRIPTION = "Makes a Wan model a SALAD model, from a file that salad_compile.save or the trainer wrote."
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL",),
                "file": (
                    "STRING",
                    {"default": "", "tooltip": f"A path, or a name in the folder {FOLDER!r} of ComfyUI's models."},
                ),
            }
        }

    @classmethod
    def IS_CHANGED(cls, model: Any = None, file: str = "") -> float:
        """When the file was written: ComfyUI runs the node again if it is another."""
        try:
            return os.stat(find_file(file)).st_mtime
        except OSError:
            return math.nan

    def load(self, model: Any, file: str) -> tuple[Any]:
        """A clone of `model` whose diffusion model is converted, and holds the tensors of the file.

        Raises:
            FileNotFoundError: there is no such file. NotASaladFileError, BaseModelMismatchError, other CheckpointError:
            it is not one for this MODEL. ConfigError: another node has replaced what this one would convert.
            AlreadyConvertedError: the MODEL holds SALAD.
        """
        path = find_file(file)
        if salad_in(model) is not None:
            raise AlreadyConvertedError("this MODEL has gone through Load SALAD already: connect it before that.")
        require_unpatched(model)
        require_wan(diffusion_model_of(model))
        patched, converted = release(model)
        load_into(converted, path, weights_dtype(patched))
        use_instead(patched, converted)
        return (patched,)


class SaladSettings:
    """How sparse, and when dense."""

    CATEGORY = CATEGORY
    DESCRIPTION = "Sparsity of a SALAD model and the steps that stay dense. Nothing is loaded or compiled again."
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "set"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL",),
                "sparsity": (
                    "FLOAT",
                    {
                        "default": 0.0,
                        "min": 0.0,
                        "max": 0.99,
                        "step": 0.01,
                        "tooltip": "0: as trained. Others need a file trained with lowest_sparsity.",
                    },
                ),
                "dense_first_steps": (
                    "INT",
                    {"default": 0, "min": 0, "max": 1000, "tooltip": "So many steps of each sampler are dense."},
                ),
                "dense": ("BOOLEAN", {"default": False, "tooltip": "All steps are dense, to compare with."}),
            }
        }

    def set(self, model: Any, sparsity: float, dense_first_steps: int, dense: bool) -> tuple[Any]:
        """A clone of `model` with these settings, which replace those of an earlier node.

        Raises:
            NotConvertedError: the MODEL did not come through Load SALAD. ConfigError: its file does not allow this
            sparsity, or the number of steps is negative.
        """
        converted = require_salad(model)
        settings = Settings(sparsity, dense_first_steps, dense)
        settings.check(converted)
        patched = model.clone()
        options = patched.model_options.get("transformer_options", {})
        patched.model_options["transformer_options"] = {**options, KEY: settings.to_dict()}
        return (patched,)


class CompileWithSalad:
    """torch.compile with the backend "salad", block by block."""

    CATEGORY = CATEGORY
    DESCRIPTION = "Compiles the blocks of a SALAD model. The first step takes minutes, the next are fast."
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "compile"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"model": ("MODEL",)},
            "optional": {
                "lowering": (
                    ["inductor", "aot_eager", "eager"],
                    {"default": "inductor", "tooltip": "Others than inductor are for the search for faults."},
                )
            },
        }

    def compile(self, model: Any, lowering: str = "inductor") -> tuple[Any]:
        """A clone of `model` whose blocks are compiled when they first run.

        Raises:
            NotConvertedError: the MODEL did not come through Load SALAD.
        """
        require_salad(model)
        require_unpatched(model)
        patched, compiled = release(model)
        for block in repeated_blocks(compiled):
            # a dictionary for each: torch takes entries out of it
            block.compile(backend="salad", options={"lowering": lowering})
        use_instead(patched, compiled)
        return (patched,)


def find_file(name: str) -> Path:
    """A path as given, or below ComfyUI's folder of models. Raises FileNotFoundError."""
    if not name.strip():
        raise FileNotFoundError("Load SALAD: the field `file` is empty.")
    places = [Path(name.strip()).expanduser()]
    if not places[0].is_absolute():
        try:
            import folder_paths  # ComfyUI's own
        except ImportError:
            pass
        else:
            places.append(Path(folder_paths.models_dir) / FOLDER / places[0])
    for place in places:
        if place.is_file() or (place / "salad.safetensors").is_file():
            return place
    raise FileNotFoundError(f"Load SALAD: there is no SALAD file at {' or '.join(map(str, places))}.")


def load_into(model: nn.Module, path: Path, dtype: torch.dtype) -> None:
    """`salad_compile.load`, with what it says about files and models told to users of ComfyUI, in one line."""
    try:
        # as ComfyUI runs nodes: tensors made in inference mode cannot be written outside of it
        with torch.inference_mode(), plain_rotation(model):
            salad_compile.load(model, path, example_inputs=example_inputs(model, dtype))
    except NotASaladFileError as error:
        raise NotASaladFileError(
            f"{path} is not a SALAD file: a LoRA goes into ComfyUI's LoRA loader, and an exported LoRA alone is not "
            "the SALAD model."
        ) from error
    except BaseModelMismatchError as error:
        raise BaseModelMismatchError(one_line(error)) from error
    except SaladError as error:
        error.args = (one_line(error),)
        raise
    steer(model)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def require_salad(model: Any) -> nn.Module:
    """The converted diffusion model of a MODEL. Raises NotConvertedError."""
    converted = salad_in(model)
    if converted is None:
        raise NotConvertedError("this MODEL holds no SALAD: put Load SALAD between its loader and this node.")
    return converted


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The entries of the model's lists of blocks. Raises ConfigError if it has no list."""
    found = [block for child in model.children() if isinstance(child, nn.ModuleList) for block in child]
    if not found:
        raise ConfigError(f"{type(model).__name__} has no list of blocks to compile.")
    return found


NODE_CLASS_MAPPINGS = {"LoadSalad": LoadSalad, "SaladSettings": SaladSettings, "CompileWithSalad": CompileWithSalad}
NODE_DISPLAY_NAME_MAPPINGS = {
    "LoadSalad": "Load SALAD",
    "SaladSettings": "SALAD settings",
    "CompileWithSalad": "Compile with SALAD",
}
