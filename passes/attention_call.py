"""AttentionCall: one attention node of a graph, its normalised arguments, and what is to become of it."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from salad_compile.calls.adapters import AttentionArguments, default_scale, mask_kind
from salad_compile.definition.operands import Mapped
from salad_compile.definition.spec import AttentionSpec
from salad_compile.passes.provenance import Tag, erase_dead, example_value, module_path

CONVERTED, TRAINING_FREE, LEFT_DENSE = "salad", "block-sparse", "dense"


@dataclass(frozen=True)
class AttentionCall:
    """One attention node, what becomes of it (`status`), and why it stays dense if it does (`reason`).

    tag: of its query projection. site: the entry marker of the tag's owner. sample: which sample of the batch this call
    is about, in models that attend to one after another. mapped: nodes with query and key before position and their
    features with it, laid out like the operands of the call; None where the linear branch takes the operands.
    """

    node: fx.Node
    arguments: AttentionArguments
    tag: fx.Node | None
    status: str
    reason: str
    site: fx.Node | None = None
    sample: int | None = None
    mapped: Mapped | None = None

    @property
    def result(self) -> torch.Tensor:
        """The attention that the call returns, as it was recorded."""
        value = example_value(self.node)
        if self.arguments.output is not None:
            assert isinstance(value, (tuple, list))
            value = value[self.arguments.output]
        assert isinstance(value, torch.Tensor), f"{self.node} has no recorded tensor"
        return value

    @property
    def dtype(self) -> torch.dtype:
        """Of the result: inside autocast, query, key and value may have others."""
        return self.result.dtype

    @property
    def tagged(self) -> Tag:
        """What the tag of its query projection carries; only of calls that have one."""
        assert self.tag is not None
        return Tag.of(self.tag)

    @property
    def spec(self) -> AttentionSpec:
        """What the converted site of this call computes."""
        return AttentionSpec.decode(self.tagged.spec)

    @property
    def shapes(self) -> list[tuple[Any, ...]]:
        """(B, H, S, D) of query, key and value; symbolic."""
        return operand_shapes(self.arguments)

    @property
    def scale(self) -> float:
        """The factor of the scores."""
        if self.arguments.scale is not None:
            return float(self.arguments.scale)
        return default_scale(int(self.shapes[0][-1]))

    @property
    def mask_kind(self) -> str:
        """What :func:`salad_compile.calls.adapters.mask_kind` says of its mask."""
        return kind_of_mask(self.arguments)

    @property
    def module(self) -> str:
        """Where the call is, for messages."""
        return module_path(self.node)

    @property
    def shape(self) -> str:
        """(batch, heads, queries, head_dim) as text; symbolic sizes print as symbols."""
        return str(self.shapes[0])

    @property
    def is_lost(self) -> bool:
        """Whether this is a converted site whose call can no longer become SALAD."""
        return self.status == LEFT_DENSE and self.tag is not None and self.tagged.is_converted

    def replace_with(self, value: fx.Node) -> None:
        """Let every user of the attention's result read `value`, and erase the node.

        Where the node returns several tensors only its attention may be in use: nothing else of it is computed.
        """
        if self.arguments.output is None:
            self.node.replace_all_uses_with(value, delete_user_cb=lambda user: user is not value)
            value.meta.update(self.node.meta)
        else:
            for user in list(self.node.users):
                if user.target is not operator.getitem or user.args[1] != self.arguments.output:
                    erase_dead(user)
                    continue
                user.replace_all_uses_with(value, delete_user_cb=lambda user: user is not value)
                value.meta.update(user.meta)
                user.graph.erase_node(user)
        self.node.graph.erase_node(self.node)


def operand_shapes(arguments: AttentionArguments) -> list[tuple[Any, ...]]:
    """(B, H, S, D) of query, key and value; symbolic."""
    samples = 1 if arguments.batch is None else recorded_tensor(arguments.batch).shape[0] - 1
    operands = (arguments.query, arguments.key, arguments.value)
    return [arguments.shape(recorded_tensor(operand).shape, samples) for operand in operands]


def kind_of_mask(arguments: AttentionArguments) -> str:
    """What :func:`salad_compile.calls.adapters.mask_kind` says of the mask of a call."""
    mask = arguments.attn_mask
    return mask_kind(None if mask is None else recorded_tensor(mask))


def recorded_tensor(node: Any) -> torch.Tensor:
    """The fake tensor of a node that computes one."""
    value = example_value(node)
    assert isinstance(value, torch.Tensor), f"{node} has no recorded tensor"
    return value
