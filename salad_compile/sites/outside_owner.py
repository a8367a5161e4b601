"""Errors of a site whose projection or attention call runs more than once, or outside of its owner's forward.

The eager twin replaces a call while the owner's forward runs. What a backward pass runs again of the inside of an owner
would be dense, with gradients that belong to another function.
"""

from __future__ import annotations

from typing import Any

import torch

from salad_compile.errors import DifferentiationError, SiteLostError
from salad_compile.kernels.differentiation import in_forward_mode

_WHOLE = "Checkpoint the whole attention module or its block, not a part of its forward."


def saving() -> Any:
    """Who decides at this place how tensors are saved for the backward pass."""
    # private. Seen in torch 2.13; tests/salad_compile/sites/test_outside_owner.py fails when it moves.
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def require_same_saving(before: Any, site: str) -> None:
    """Raises SiteLostError if a checkpoint has begun inside the owner since `before`."""
    now = saving()
    # a qualified name of torch's own; seen in torch 2.13, and tested with `saving`
    if now is not None and now != before and now[0].__qualname__.startswith("_checkpoint_hook"):
        raise SiteLostError(
            f"the converted site {site!r} checkpoints activations inside its own forward: what a backward pass "
            f"computes again would be dense. {_WHOLE}"
        )


def recomputed_error(site: str) -> SiteLostError:
    """A projection of a site runs in a backward pass, and its owner's forward does not."""
    return SiteLostError(
        f"a backward pass runs the projections of the converted site {site!r} again without the module around them: "
        f"its attention would be dense there. {_WHOLE}"
    )


def replaced_error(site: str) -> SiteLostError:
    """A projection of a site runs while the model does, and its owner's forward does not."""
    return SiteLostError(
        f"the query projection of the converted site {site!r} ran outside of its module's forward: that was replaced "
        "after conversion, and its attention would be dense. Convert the model after replacing it."
    )


def twice_error(site: str) -> SiteLostError:
    """One forward of an owner runs the query projection twice."""
    return SiteLostError(
        f"the converted site {site!r}: its query projection ran twice in one forward of its module, so that it cannot "
        "be told to which attention call the gate belongs. Leave the site out: sites=['!...']."
    )


def no_tensor_error(site: str, role: str, returned: Any) -> SiteLostError:
    """A projection of a site returned something else than a tensor, or a tuple that begins with one."""
    return SiteLostError(
        f"the {role} projection of the converted site {site!r} returned a {type(returned).__name__} without a tensor, "
        "or was given none: its input and its result must be tensors, the result alone or first of a tuple."
    )


def require_reverse_mode(site: str) -> None:
    """Raises DifferentiationError under torch.func.jvp and its like."""
    if in_forward_mode():
        raise DifferentiationError(
            f"the converted site {site!r} runs under forward-mode differentiation (torch.func.jvp, jacfwd, dual "
            "tensors), which SALAD attention does not have. Use reverse mode, or salad_compile.set_dense(model)."
        )
