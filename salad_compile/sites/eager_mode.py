"""The eager twin: in an uncompiled forward, a converted site's attention call computes the same definition.

Never active while Dynamo traces: compiled graphs get the definition from the passes, and a mode that is active when a
compiled graph then runs eagerly would apply it twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextvars import ContextVar, Token
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function

from salad_compile.calls import autograd_functions
from salad_compile.calls.adapters import (
    AttentionArguments,
    bind,
    default_scale,
    dense_reason,
    in_place_of,
    is_attention,
    is_padding,
    key_padding,
    mask_kind,
    warn_of_dropout,
)
from salad_compile.calls.flash_family import find_family
from salad_compile.calls.flex_attention import real_flex_attention, seen_by_modes
from salad_compile.calls.packed_samples import different_lengths
from salad_compile.calls.softmax_products import of_tensors
from salad_compile.definition.attention import salad_of
from salad_compile.definition.operands import Mapped, operands_of
from salad_compile.definition.spec import AttentionSpec
from salad_compile.errors import SiteLostError
from salad_compile.grid.video_grid import order_error
from salad_compile.kernels.exchange.api import members
from salad_compile.kernels.measure import Execution, measure_executions
from salad_compile.position.recording import Recorded
from salad_compile.position.sequences import PositionRecording
from salad_compile.sites import observers
from salad_compile.sites.outside_owner import require_reverse_mode, require_same_saving, saving, twice_error
from salad_compile.sites.row_check import RowCheck
from salad_compile.sites.site import Site

AddUpdates = Callable[[str, Tensor, Tensor], Tensor]  # first role, input and output of a projection -> its output

_NOT_MEASURED: contextlib.AbstractContextManager[list[Execution]] = contextlib.nullcontext([])


_running: ContextVar[SaladMode | None] = ContextVar("salad_compile.eager_mode", default=None)


def running(site: Site) -> SaladMode | None:
    """The mode under which a site's owner runs in this thread or task; None if it does not."""
    mode = _running.get()
    while mode is not None and mode.site is not site:
        mode = mode.outer
    return mode


def add_updates(x: Tensor, out: Tensor) -> Tensor:
    """Stands for the low-rank updates of a projection of `x` among the operations in which position is found."""
    raise NotImplementedError


def _run(function: Callable[[], Tensor]) -> Tensor:
    return function()


class SaladMode(Recorded, TorchFunctionMode):
    """Replaces one attention call of a converted module's forward, the one that discovery saw.

    The site is identified twice: by the call's number within the forward, and by the query projection having run just
    before with as many tokens as the call has queries. Sparsity must never leak into cross-attention. Models that
    attend to one sample after another (Mochi) make one call for each.

    Args:
        site: whose forward runs. text: the owner's argument that tells how much is text, or None.
        definition: what is computed, :func:`salad_of` or the same compiled.
    """

    def __init__(self, site: Site, text: Tensor | None, definition: Callable[..., Tensor] = salad_of) -> None:
        super().__init__()
        self.definition = definition
        self.site = site
        self.text = text
        self.outer = _running.get()  # nested owners
        self.calls = 0
        self.replaced = 0
        self.is_passive = False  # while nothing of what runs is looked at
        self.saving, self.began_with_gradients = saving(), torch.is_grad_enabled()
        self.armed: Tensor | None = None  # the gate's input, once the query projection has run
        self.keeps_gradients = False  # whether they were on when the query projection ran
        self.rows = RowCheck(site)
        self._outer: list[Token[SaladMode | None]] = []
        spec = site.decoded_spec()
        self.recording: PositionRecording | None
        self.recording = PositionRecording(spec.text == "prefix") if spec.maps_before_position else None
        kind = site.record.call
        self.by_hand = of_tensors(self.permute) if kind in ("", "products") else None
        # arguments and result of the latest linear map, until it is known whether a hook of ours reports it
        self.unreported: tuple[tuple[Any, ...], dict[str, Any], Tensor] | None = None
        # the recording, while nobody else looks at operations
        self.follows = self.recording if self.by_hand is None else None
        find_family()
        self.functions = autograd_functions.seen_by_modes()
        self.flex = seen_by_modes(real_flex_attention)  # an attention backend may be chosen after conversion

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if kwargs is None:
            kwargs = {}
        if self.is_passive:
            return func(*args, **kwargs)
        if self.recording is not None and self.by_hand is None:
            if self.unreported is not None:
                self._record_unreported()
            if func is F.linear:
                return self._run_linear(args, kwargs)
            follows = self.follows
            if follows is not None and (step := follows.expected) is not None and step.func is func:
                return follows.follow(step, args, kwargs)
        by_hand = None
        if not is_attention(func):
            if self.by_hand is None:
                if self.rows.tracker is not None:
                    return self.run(func, args, kwargs)
                recording = self.recording
                return func(*args, **kwargs) if recording is None else recording.run(func, args, kwargs)
            by_hand = self.by_hand.bind(func, args, kwargs)
            if by_hand is None:
                out = self.run(func, args, kwargs)
                self.by_hand.note(func, args, kwargs, out)
                return out
        return self._attend(func, args, kwargs, by_hand)

    def _run_linear(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """A linear map is recorded with the next operation, unless a hook says before that it was a projection's."""
        out = F.linear(*args, **kwargs)
        self.rows.note(F.linear, args, kwargs, out)
        self.unreported = args, kwargs, out
        return out

    def _record_unreported(self) -> None:
        if self.unreported is None or self.recording is None:
            return
        args, kwargs, out = self.unreported
        self.unreported = None
        self.recording.add_operation(F.linear, args, out, kwargs)

    def _report(self, x: Tensor, out: Tensor) -> None:
        """A projection of `x` returned `out`: what it ran inside is no part of what position is found in."""
        if self.unreported is not None:
            args, _, returned = self.unreported
            if returned is out and args and args[0] is x:
                self.unreported = None
            else:
                self._record_unreported()

    def run_query(self, add: AddUpdates, first: str, x: Tensor, out: Tensor) -> Tensor:
        """:meth:`run_projection` of the query: the next call of the size of `x` is the site's."""
        return self._run_unseen(self._begin, add, first, x, out)

    def _begin(self, add: AddUpdates, first: str, x: Tensor, out: Tensor) -> Tensor:
        self._arm(x)
        out = self._project(add, first, x, out)
        self.rows.start(x, out)
        if self.rows.tracker is not None:
            self.follows = None
        return out

    def _arm(self, gate_input: Tensor) -> None:
        if self.armed is not None and not gate_input.is_set_to(self.armed):  # of one input there is one gate
            raise twice_error(self.site.record.owner)
        self.armed, self.keeps_gradients = gate_input, torch.is_grad_enabled()

    def run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation of the model."""
        recording = self.recording
        out = func(*args, **kwargs) if recording is None else recording.run(func, args, kwargs)
        if self.rows.tracker is not None:
            self.rows.note(func, args, kwargs, out)
        return out

    def run_projection(self, add: AddUpdates, first: str, x: Tensor, out: Tensor) -> Tensor:
        """The output `out` of a projection of `x` with its updates, which are no part of what position is found in.

        Args:
            add: adds the updates. first: the first role of the projection.
        """
        return self._run_unseen(self._project, add, first, x, out)

    def _project(self, add: AddUpdates, first: str, x: Tensor, out: Tensor) -> Tensor:
        self._report(x, out)
        out = add(first, x, out)
        if self.recording is not None:
            self.recording.add_projection(x, out)
        return out

    def run_updates(self, add: AddUpdates, first: str, x: Tensor, out: Tensor) -> Tensor:
        """:meth:`run_projection` where position is not looked for in the result."""
        return self._run_unseen(self._update, add, first, x, out)

    def _update(self, add: AddUpdates, first: str, x: Tensor, out: Tensor) -> Tensor:
        self._report(x, out)
        result = add(first, x, out)
        if self.recording is not None:
            self.recording.add_operation(add_updates, (x, out), result)
        return result

    def _run_unseen(
        self, function: Callable[..., Tensor], add: AddUpdates, first: str, x: Tensor, out: Tensor
    ) -> Tensor:
        """Run a function of which this mode sees nothing. It sees one call instead, and is not active in that."""
        if not has_torch_function((x,)):  # somebody switched all modes off
            return function(add, first, x, out)
        if _is_alone(self):
            # what `handle_torch_function` does, in a fifth of the time; private as in `_is_alone`
            torch._C._pop_torch_function_stack()
            try:
                return function(add, first, x, out)
            finally:
                torch._C._push_on_torch_function_stack(self)
        before, self.is_passive = self.is_passive, True
        try:
            result: Tensor = handle_torch_function(_run, (x,), lambda: function(add, first, x, out))
            return result
        finally:
            self.is_passive = before

    def _attend(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        by_hand: AttentionArguments | None,
    ) -> Any:
        """An attention call: the site's is replaced, others run as they are."""
        call, gate_input = by_hand, None
        if self.calls == self.site.record.call_index + self.replaced and self.armed is not None:
            call = by_hand or bind(func, args, kwargs, lambda tensor: tensor.dim())
            gate_input = self._gate_input(call, self.armed)
            if gate_input is not None:
                autograd_functions.leave_function()
        self.calls += 1
        if gate_input is None:
            return func(*args, **kwargs)
        assert call is not None
        assert self.armed is not None
        self._require_gradients()
        result = self._replace(call, gate_input)
        # one call, or the last of one for each sample
        self.is_passive = gate_input is self.armed or self.replaced == self.armed.shape[0]
        if self.is_passive:
            self.rows.remember(self.armed)
            self.recording = self.follows = self.unreported = None
        return in_place_of(func, call, result)

    def _require_gradients(self) -> None:
        """Raises SiteLostError where the branch would silently get no gradient."""
        if (
            self.keeps_gradients
            and not torch.is_grad_enabled()
            and any(p.requires_grad for p in self.site.parameters())
        ):
            raise SiteLostError(
                f"the attention call of the converted site {self.site.record.owner!r} runs without gradients (inside "
                "torch.no_grad, or in an autograd Function of its own that is not written in Python), so its branch "
                "would get none. Give the function that the model calls to salad_compile.attention_adapter, or run "
                "the whole model without gradients."
            )

    def _gate_input(self, call: AttentionArguments, armed: Tensor) -> Tensor | None:
        """The rows of the query projection's input that belong to this call, or None if it is not this site's."""
        samples = 1 if call.batch is None else call.batch.shape[0] - 1
        batch, _, queries, _ = call.shape(call.query.shape, samples)
        spec = self.site.decoded_spec()
        one_call = bool(spec.gate_axes) or (spec.gates_every_query and armed.shape[:-1].numel() == batch * queries)
        if batch == 1 and armed.dim() == 3 and armed.shape[0] > 1 and not one_call:
            if self.replaced >= armed.shape[0]:
                return None
            armed = armed[self.replaced : self.replaced + 1]
        elif self.replaced:
            return None
        rows = armed.shape[:-1].numel()
        fits = rows == batch * queries if spec.gates_every_query else rows <= batch * queries
        return armed if fits else None

    def _replace(self, call: AttentionArguments, gate_input: Tensor) -> Tensor:
        site = self.site
        query, key, value = call.heads_first(call.query), call.heads_first(call.key), call.heads_first(call.value)
        spec, kind = site.decoded_spec(), mask_kind(call.attn_mask)
        padding = spec.square_mask and kind == "square"
        if padding and site.measured_sparsity is None:  # once: reading values waits for the device
            padding = is_padding(call.attn_mask)
        require_same_saving(self.saving, site.record.owner)
        require_reverse_mode(site.record.owner)
        order = site.order(query.device)
        if site.lacks_order(order):
            raise order_error(f"the converted site {site.record.owner!r}")
        reason = dense_reason(call, [t.shape for t in (query, key, value)], kind, square_is_padding=padding)
        reason = reason or self.rows.fault(call, None if gate_input is self.armed else self.replaced)
        reason = reason or _misfit(spec, query, key, order, gate_input, self.text)
        reason = reason or different_lengths(call.batch, call.key_batch, len(call.query), len(call.key))
        if reason:
            raise SiteLostError(
                f"the converted site {site.record.owner!r} cannot run as SALAD: {reason}, which was not so at "
                "conversion. Convert with example_inputs that show it, or leave it out of the call."
            )
        if call.dropout_p:
            warn_of_dropout(call.dropout_p)
        self.replaced += 1
        scale = default_scale(query.shape[-1]) if call.scale is None else float(call.scale)
        mask = key_padding(call.attn_mask, kind, query.shape[0]) if kind else None
        mapped = None
        if self.recording is not None:
            mapped = self.recording.mapped(call.query, call.key, spec.feature_map, site.record.owner)
        if mapped is not None and call.layout != "BHSD":
            mapped = Mapped(*(call.heads_first(operand) for operand in mapped))
        dtype, tensors = _result_dtype(value if call.by_hand else query), site.tensors()
        given = operands_of(query, key, value, gate_input, tensors, order, spec, dtype, mask, self.text, mapped)
        if observers.is_observed():
            observers.notify(site, given, spec, scale)
        # measured once: counting waits for the device
        with measure_executions() if site.measured_sparsity is None else _NOT_MEASURED as executions:
            out = self.definition(given, spec, scale)
        if executions:  # none on the meta device
            site.measured_sparsity, site.engine = executions[0].sparsity, executions[0].engine
        result: Tensor = call.as_called(out)
        return result

    def __enter__(self) -> SaladMode:
        self._outer.append(_running.set(self))
        self.flex.__enter__()
        self.functions.__enter__()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self.functions.__exit__(*error)
        self.flex.__exit__(*error)
        _running.reset(self._outer.pop())
        self.armed = self.recording = self.follows = (
            None  # what this holds refers to it, and would keep the tensors alive
        )

    def require_replaced(self) -> None:
        """Raises SiteLostError when the forward ran and its attention call was not met: never silently dense."""
        if not self.replaced:
            record = self.site.record
            raise SiteLostError(
                f"the converted site {record.owner!r} ran without SALAD: of the {self.calls} attention calls of its "
                f"forward, none was call number {record.call_index} with the queries of {record.query!r}. Its "
                "attention processor or a projection was replaced after conversion (attention_backend(...), "
                "fuse_qkv_projections(), set_attn_processor(...)?). Convert the model after such changes; after "
                "enable_parallelism(...) call salad_compile.parallelise(model)."
            )


def _is_alone(mode: TorchFunctionMode) -> bool:
    """Whether no other function mode is active.

    Private functions of torch._C. Seen in torch 2.13; tests/salad_compile/sites/test_private_names.py fails when they
    move.
    """
    return torch._C._len_torch_function_stack() == 1 and torch._C._get_function_stack_at(0) is mode


def _misfit(
    spec: AttentionSpec, query: Tensor, key: Tensor, order: Tensor | None, gate_input: Tensor, text: Tensor | None
) -> str:
    """Why the lengths of a call contradict each other, or the empty string."""
    queries, keys = query.shape[2], key.shape[2]
    if queries > keys or (queries < keys and spec.text != "prefix"):
        return f"{queries} queries meet {keys} keys"
    if spec.single and order is None and text is None:
        return "neither the token grid nor an argument tells how much of it is text (call the whole model)"
    if order is None:
        return ""
    rows = gate_input.shape[:-1].numel() // query.shape[0] * members(spec.process_group)
    if order.shape[1] > rows or (not spec.single and order.shape[1] != rows):
        return f"the token grid has {order.shape[1]} tokens and the site {rows}"
    return ""


def _result_dtype(operand: Tensor) -> torch.dtype:
    """What the call would return: torch's functions are autocast, operators of torch.library are not."""
    device = operand.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and operand.is_floating_point():
        return torch.get_autocast_dtype(device)
    return operand.dtype
