"""The eager twin: in an uncompiled forward, a converted site's attention call computes the same definition.

Never active while Dynamo traces: compiled graphs get the definition from the passes, and a mode that is active when a
compiled graph then runs eagerly would apply it twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .attention import salad_attention
from .attention_call import ATTENTION_FUNCTIONS, AttentionArguments, default_scale, dense_reason
from .config import AttentionSpec
from .errors import SiteLostError
from .kernels.measure import Execution, measure_executions

if TYPE_CHECKING:
    from .branch import SaladBranch

_NOT_MEASURED: contextlib.AbstractContextManager[list[Execution]] = contextlib.nullcontext([])


class SaladMode(TorchFunctionMode):
    """Replaces one attention call of a converted module's forward, the one that discovery saw.

    The site is identified twice: by the call's number within the forward, and by the query projection having run just
    before with as many tokens as the call has queries and keys. Sparsity must never leak into cross-attention.
    """

    def __init__(self, branch: SaladBranch) -> None:
        super().__init__()
        self.branch = branch
        self.calls = 0
        self.replaced = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in ATTENTION_FUNCTIONS:
            return func(*args, **kwargs)
        self.calls += 1
        if self.calls - 1 != self.branch.record.call_index or self.branch.armed is None:
            return func(*args, **kwargs)
        call = AttentionArguments.bind(args, kwargs)
        if call.query.shape[-2] != self.branch.armed.shape[-2] or call.key.shape[-2] != call.query.shape[-2]:
            return func(*args, **kwargs)
        return self._replace(call)

    def _replace(self, call: AttentionArguments) -> Tensor:
        branch = self.branch
        if reason := dense_reason(call, call.query.shape, call.key.shape, call.value.shape):
            raise SiteLostError(
                f"the converted site {branch.record.owner!r} cannot run as SALAD: {reason}, which was not so at "
                "conversion. Convert with example_inputs that show it, or leave it out of the call."
            )
        gate_input, branch.armed = branch.armed, None
        assert gate_input is not None
        self.replaced += 1
        arguments = (call.query, call.key, call.value, gate_input, branch.tensors(), None)
        scale = default_scale(call.query.shape[-1]) if call.scale is None else call.scale
        spec, dtype = AttentionSpec.decode(branch.spec), _result_dtype(call.query)
        # measured once: counting waits for the device
        with measure_executions() if branch.measured_sparsity is None else _NOT_MEASURED as executions:
            out = salad_attention(*arguments, spec, scale=scale, dtype=dtype)
        if executions:  # none on the meta device
            branch.measured_sparsity = executions[0].sparsity
        return out

    def require_replaced(self) -> None:
        """Raises SiteLostError when the forward ran and its attention call was not met: never silently dense."""
        if not self.replaced:
            site = self.branch.record
            raise SiteLostError(
                f"the converted site {site.owner!r} ran without SALAD: of the {self.calls} attention calls of its "
                f"forward, none was call number {site.call_index} with the queries of {site.query!r}. Its attention "
                "processor or a projection was replaced after conversion (attention_backend(...), "
                "fuse_qkv_projections(), set_attn_processor(...)?). Convert the model after such changes."
            )


def _result_dtype(query: Tensor) -> torch.dtype:
    """What scaled_dot_product_attention would return: it is autocast, operators of torch.library are not."""
    device = query.device.type
    if torch.is_autocast_enabled(device) and query.is_floating_point():
        return torch.get_autocast_dtype(device)
    return query.dtype
