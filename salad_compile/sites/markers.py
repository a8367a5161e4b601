"""Marker operators that exist in traced graphs only, between Dynamo and our passes.

They compute nothing. `salad::tag` is an identity on the output of a query projection: because it mentions the layer's
input and the branch's tensors, Dynamo lifts both as guarded graph inputs, so that one compiled block graph serves
all blocks with their own parameters. `salad::site` says that a converted attention module was entered: a site without
its tag has lost its projection. Where an argument of the module tells how much of a joint sequence is text, it carries
that. The passes erase both; a marker erased without a rewrite would be the silent no-op.

Both raise when they are executed: then another backend compiled a converted model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from salad_compile.common.projections import projection_call
from salad_compile.errors import WrongBackendError

_MESSAGE = (
    "this model was converted by salad_compile.convert and then compiled with another backend, which would drop the "
    "SALAD branches. Compile it with torch.compile(model, backend='salad'), or run it uncompiled."
)


@torch.library.custom_op("salad::tag", mutates_args=())
def tag(out: Tensor, gate_input: Tensor, tensors: list[Tensor], order: Tensor | None, spec: str) -> Tensor:
    """Identity on `out`, the query projection's output. See the module's text.

    tensors: the branch's mark, then its tensors in the order of `branch_tensors.names`.
    """
    raise WrongBackendError(_MESSAGE)


@tag.register_fake
def _tag_fake(out: Tensor, gate_input: Tensor, tensors: list[Tensor], order: Tensor | None, spec: str) -> Tensor:
    return torch.empty_like(out)


def _tag_backward(ctx: Any, grad: Tensor) -> Any:
    # Without a formula AOTAutograd would say "Trying to backward through salad.tag": true, and no help to anybody.
    raise WrongBackendError(_MESSAGE)


tag.register_autograd(_tag_backward)


@torch.library.custom_op("salad::site", mutates_args=())
def site(mark: Tensor, text: Tensor | None) -> Tensor:
    """Marks that the module whose branch owns `mark` was entered, with that text. See the module's text."""
    raise WrongBackendError(_MESSAGE)


@site.register_fake
def _site_fake(mark: Tensor, text: Tensor | None) -> Tensor:
    return torch.empty_like(mark)


@torch.library.custom_op("salad::projected", mutates_args=())
def projected(out: Tensor) -> Tensor:
    """Identity on the output of a key's or of a text stream's projection, where its position is to be found."""
    raise WrongBackendError(_MESSAGE)


@projected.register_fake
def _projected_fake(out: Tensor) -> Tensor:
    return torch.empty_like(out)


projected.register_autograd(_tag_backward)


# Dynamo keeps the spelling that the hook used, export the overload: passes look for both.
TAGS = frozenset({torch.ops.salad.tag, torch.ops.salad.tag.default})
SITES = frozenset({torch.ops.salad.site, torch.ops.salad.site.default})
PROJECTED = frozenset({torch.ops.salad.projected, torch.ops.salad.projected.default})

# The spec of the tag on attention that the conversion decided to leave dense.
DENSE = "dense"

# The spec of the tag of a site that lacks the order of the video's tokens: the passes raise.
NO_ORDER = "no order"


def leave_dense(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], returned: Any) -> Any:
    """Forward hook of the query projection of self-attention that stays dense: compiled, the passes must know."""
    call = projection_call(module, args, kwargs, returned) if torch.compiler.is_compiling() else None
    return returned if call is None else call.rebuild(tag_dense(call.x, call.out))


def tag_dense(x: Tensor, out: Tensor) -> Tensor:
    """`out`, tagged as the query of attention that stays dense."""
    tagged: Tensor = torch.ops.salad.tag(out, x, [], None, DENSE)
    return tagged
