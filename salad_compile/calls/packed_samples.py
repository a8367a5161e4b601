"""Packed samples: cut by their number, so each must be as long as the others, which every run looks up.

The lengths are values, which graphs do not know: there an operator looks at them. It is an identity on the query (a
copy), so that nothing can leave it out; reading the lengths waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Private. Seen in torch 2.11 and 2.13; tests/salad_compile/discovery/test_discover.py fails when it moves.
from torch._subclasses.fake_tensor import is_fake

from salad_compile.errors import SiteLostError

_SHOWN = 8


def different_lengths(batch: Tensor | None, key_batch: Tensor | None, tokens: int, key_tokens: int) -> str:
    """Why packed samples cannot be cut evenly, or the empty string; tensors without memory are not looked at.

    Args:
        batch, key_batch: where samples begin and end (cu_seqlens), for queries and keys. tokens, key_tokens: of all.
    """
    for ends, total in ((batch, tokens), (key_batch, key_tokens)):
        if ends is None or ends.device.type == "meta" or is_fake(ends):
            continue
        found = ends.tolist()
        samples = len(found) - 1
        if samples < 1 or total % samples or found != [total // samples * i for i in range(samples + 1)]:
            shown = f"{found[:_SHOWN]}{'...' if len(found) > _SHOWN else ''}"
            return (
                f"its packed samples have different lengths, or padding between them ({shown} of {total} tokens): give "
                "the model samples of one length, or one at a time"
            )
    return ""


@torch.library.custom_op("salad::require_equal_samples", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def require_equal_samples(query: Tensor, batch: Tensor, key_batch: Tensor | None, key_tokens: int) -> Tensor:
    """A copy of `query`, (tokens, H, D), whose samples have one length. Raises SiteLostError if they have not."""
    reason = different_lengths(batch, key_batch, query.shape[0], key_tokens)
    if reason:
        raise SiteLostError(
            f"a compiled attention call cannot run sparse: {reason}. To keep this attention dense compile the model "
            "without backend='salad'."
        )
    return query.clone()


@require_equal_samples.register_fake
def _fake(query: Tensor, batch: Tensor, key_batch: Tensor | None, key_tokens: int) -> Tensor:
    return torch.empty_like(query)


def _backward(ctx: Any, grad: Tensor) -> Any:
    return grad, None, None, None


require_equal_samples.register_autograd(_backward)
