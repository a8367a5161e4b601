"""As much of ComfyUI as nodes see of it, written from its public behaviour: a model whose clones share one module.

Object patches and weights that LoRA changed are written into the shared module when a clone is used, not when it is
made, and stay there until another clone is used or this one is let go.
"""

from __future__ import annotations

import copy
import uuid
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.original_wan import HEADS, NodeAttention, NodeWanModel, choose_attention


class CastLinear(nn.Linear):
    """A layer whose weight is stored in one dtype, and computed with in that of its input."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x)
        return F.linear(x, self.weight.to(x), bias)


@torch.library.custom_op("comfyui_stand_in::rotate", mutates_args=())
def _rotate(x: Tensor, matrices: Tensor) -> Tensor:
    pairs = x.float().unflatten(-1, (-1, 1, 2))
    return (matrices[..., 0] * pairs[..., 0] + matrices[..., 1] * pairs[..., 1]).flatten(-2).type_as(x)


@_rotate.register_fake
def _(x: Tensor, matrices: Tensor) -> Tensor:
    return torch.empty_like(x)


def apply_rope1(x: Tensor, matrices: Tensor) -> Tensor:
    return _rotate(x, matrices)


class FusedAttention(NodeAttention):
    """Rotation in one operator, which nobody sees through."""

    def forward(self, x: Tensor, context: Tensor, angles: Tensor | None) -> Tensor:
        query, key, value = self.norm_q(self.q(x)), self.norm_k(self.k(context)), self.v(context)
        if angles is not None:
            cos, sin = angles.cos(), angles.sin()
            matrices = torch.stack([cos, -sin, sin, cos], dim=-1).unflatten(-1, (2, 2)).float()
            query, key = (apply_rope1(t.unflatten(2, (HEADS, -1)), matrices).flatten(2) for t in (query, key))
        return self.o(choose_attention(query, key, value, heads=HEADS))


class WanModel(NodeWanModel):
    """Named as ComfyUI names it."""

    attention = FusedAttention

    def __init__(self) -> None:
        super().__init__()
        for module in self.modules():
            if type(module) is nn.Linear:
                module.__class__ = CastLinear


class ShorterModel(nn.Module):
    """Of another family."""

    def __init__(self) -> None:
        super().__init__()
        self.input_blocks = nn.ModuleList([nn.Linear(4, 4)])


class BaseModel(nn.Module):
    def __init__(self, diffusion_model: nn.Module) -> None:
        super().__init__()
        self.diffusion_model = diffusion_model
        self.written: uuid.UUID | None = None  # whose weights lie in the module

    def get_dtype_inference(self) -> torch.dtype:
        return torch.float32


class ModelPatcher:
    def __init__(self, model: BaseModel, dynamic: bool = False) -> None:
        self.model, self.dynamic = model, dynamic
        self.size = sum(p.numel() * p.element_size() for p in model.parameters())
        self.patches: dict[str, list[Tensor]] = {}
        self.object_patches: dict[str, Any] = {}
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.patches_uuid = uuid.uuid4()
        self.backup: dict[str, nn.Parameter] = {}  # these two are shared by all clones
        self.object_patches_backup: dict[str, Any] = {}

    def is_dynamic(self) -> bool:
        return self.dynamic

    def clone(self, disable_dynamic: bool = False) -> ModelPatcher:
        made = ModelPatcher(self.model, self.dynamic and not disable_dynamic)
        made.size, made.patches_uuid = self.size, self.patches_uuid
        made.patches = {key: [*found] for key, found in self.patches.items()}
        made.object_patches = dict(self.object_patches)
        made.model_options = copy.deepcopy(self.model_options)
        made.backup, made.object_patches_backup = self.backup, self.object_patches_backup
        return made

    def add_object_patch(self, name: str, patch: Any) -> None:
        self.object_patches[name] = patch

    def get_model_object(self, name: str) -> Any:
        for patches in (self.object_patches, self.object_patches_backup):
            if name in patches:
                return patches[name]
        return attribute(self.model, name)

    def add_patches(self, patches: dict[str, Tensor]) -> list[str]:
        known = [key for key in patches if key in self.model.state_dict()]
        for key in known:
            self.patches.setdefault(key, []).append(patches[key])
        self.patches_uuid = uuid.uuid4()
        return known

    def use(self) -> nn.Module:
        """Write what this clone has into the shared module, and return that."""
        if self.model.written not in (None, self.patches_uuid):
            self._restore_weights()
        self._restore_objects()
        for name, patch in self.object_patches.items():
            self.object_patches_backup.setdefault(name, replace(self.model, name, patch))
        if self.model.written is None:
            for key, updates in self.patches.items():
                weight = attribute(self.model, key)
                total = sum(updates, start=weight.float()).to(weight.dtype)
                self.backup[key] = replace(self.model, key, nn.Parameter(total, requires_grad=False))
            self.model.written = self.patches_uuid
        return self.model.diffusion_model

    def detach(self, unpatch_all: bool = True) -> None:
        self._restore_weights()
        self._restore_objects()

    def _restore_weights(self) -> None:
        for key, weight in self.backup.items():
            replace(self.model, key, weight)
        self.backup.clear()
        self.model.written = None

    def _restore_objects(self) -> None:
        for name, module in self.object_patches_backup.items():
            replace(self.model, name, module)
        self.object_patches_backup.clear()


def attribute(model: Any, name: str) -> Any:
    for part in name.split("."):
        model = getattr(model, part)
    return model


def replace(model: Any, name: str, value: Any) -> Any:
    """Set an attribute below `model`; returns the one before."""
    owner, _, last = name.rpartition(".")
    place = attribute(model, owner) if owner else model
    before = getattr(place, last)
    setattr(place, last, value)
    return before
