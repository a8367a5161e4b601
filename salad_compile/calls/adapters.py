"""What counts as an attention call, and its arguments in one form.

diffusers' dispatcher passes keyword arguments, older processors mix positionals and keywords, other models call
operators of their own: they are bound once, here, for tensors (discovery, eager twin) and graph nodes (passes) alike.
An adapter says which arguments are query, key and value and how they lie; :func:`attention_adapter` adds one.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar, get_args

import torch
import torch.nn.functional as F

from salad_compile.calls import autograd_functions, python_functions
from salad_compile.common.logs import logger
from salad_compile.errors import AdapterError, did_you_mean

# How query, key and value lie: batch, heads, sequence (tokens), head_dim. "SHD" is packed: (batch * tokens, H, D).
Layout: TypeAlias = Literal["BHSD", "BSHD", "HSD", "SHD"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)


@dataclass(frozen=True)
class AttentionArguments:
    """One attention call: tensors, or the nodes that stand for them.

    Attributes:
        query, key, value: in `layout`.
        attn_mask, dropout_p, is_causal, scale, enable_gqa: as in scaled_dot_product_attention.
        layout: "BHSD", "BSHD", "HSD" (one sample) or "SHD" (samples of equal length, packed one after another).
        batch: for "SHD": a tensor with one entry more than there are samples (cu_seqlens), or None for one sample.
        key_batch: the same for the keys, where it is another tensor.
        output: which element of the call's result is the attention's, or None where the result is a tensor.
        results: how many elements such a result has. Only for functions: an operator's schema tells.
        by_hand: whether the model computes it by products and a softmax (softmax_products.py).
        reason: why the call must stay dense whatever its tensors are, or the empty string.
    """

    query: Any
    key: Any
    value: Any
    attn_mask: Any = None
    dropout_p: Any = 0.0
    is_causal: Any = False
    scale: Any = None
    enable_gqa: Any = False
    layout: Layout = "BHSD"
    batch: Any = None
    key_batch: Any = None
    output: int | None = None
    results: int | None = None
    by_hand: bool = False
    reason: str = ""

    def heads_first(self, tensor: Any) -> Any:
        """A query, key or value in this call's layout as (B, H, S, D). For tensors and for `fx.Proxy` objects."""
        if self.layout == "BSHD":
            return tensor.transpose(1, 2)
        if self.layout == "HSD":
            return tensor.unsqueeze(0)
        if self.layout == "SHD":
            return tensor.unflatten(0, (self._samples(), -1)).transpose(1, 2)
        return tensor

    def as_called(self, out: Any) -> Any:
        """Inverse of :meth:`heads_first`, for the result."""
        if self.layout == "BSHD":
            return out.transpose(1, 2)
        if self.layout == "HSD":
            return out.squeeze(0)
        if self.layout == "SHD":
            return out.transpose(1, 2).flatten(0, 1)
        return out

    def shape(self, shape: Sequence[Any], samples: Any = 1) -> tuple[Any, ...]:
        """The (B, H, S, D) of a tensor of shape `shape`; of any other rank as it is, which nothing accepts."""
        if self.layout == "HSD" and len(shape) == 3:
            return (1, *shape)
        if self.layout == "SHD" and len(shape) == 3:
            return (samples, shape[1], shape[0] // samples, shape[2])
        if self.layout == "BSHD" and len(shape) == 4:
            return (shape[0], shape[2], shape[1], shape[3])
        return tuple(shape)

    def _samples(self) -> Any:
        return 1 if self.batch is None else self.batch.shape[0] - 1


Adapter = Callable[..., AttentionArguments]
AnyAdapter = TypeVar("AnyAdapter", bound=Adapter)

_ADAPTERS: dict[Any, Adapter] = {}
_unmet: dict[Adapter, str] = {}  # adapters of users that no call has come to yet -> names of their targets


def attention_adapter(*targets: Any) -> Callable[[AnyAdapter], AnyAdapter]:
    """Decorator: teach discovery, eager twin and passes that calls of `targets` are attention.

        @salad_compile.attention_adapter(torch.ops.flash_attn._flash_attn_forward)
        def _(q, k, v, dropout_p, softmax_scale, causal, *rest, **more):
            scale = {"scale": softmax_scale, "is_causal": causal}
            return salad_compile.AttentionArguments(q, k, v, **scale, layout="BSHD", output=0)

    The function has the signature of the operator and picks arguments: in graphs it gets `fx.Node` objects, so it must
    not compute with them. Register it before `convert` and before the first compilation. A target that no forward has
    called by the end of a `plan` is named in a warning.

    Args:
        targets: operators, Python functions or subclasses of `torch.autograd.Function` as a forward calls them; of an
            operator packet all overloads are meant, of a Function its `apply`. The adapter of a Function has the
            signature of `apply`, without the context. flash_attn and its family need no adapter.

    Raises:
        AdapterError: a target is no callable.
    """
    for target in targets:
        if not callable(target):
            raise AdapterError(f"attention_adapter takes functions or torch operators, got {target!r}.")

    def register(adapter: AnyAdapter) -> AnyAdapter:
        for target in targets:
            register_adapter(_seen_as(target), adapter)
        _unmet[adapter] = ", ".join(
            target.__qualname__ if isinstance(target, (type, types.FunctionType)) else str(target) for target in targets
        )
        return adapter

    return register


def _seen_as(target: Any) -> Any:
    """What modes and graphs say that they call when a model calls `target`."""
    if isinstance(target, type) and issubclass(target, torch.autograd.Function):
        return autograd_functions.know(target)
    if isinstance(target, types.FunctionType) and not target.__module__.startswith("torch."):
        python_functions.know(target)  # those of torch itself tell modes
    return target


def register_adapter(target: Any, adapter: Adapter) -> None:
    """Like :func:`attention_adapter`, for what this package itself knows."""
    _ADAPTERS[target] = adapter
    if isinstance(target, torch._ops.OpOverloadPacket):
        overloads: list[str] = target.overloads()  # type: ignore[no-untyped-call]
        _ADAPTERS.update({getattr(target, overload): adapter for overload in overloads})
    if isinstance(target, torch._library.custom_ops.CustomOpDef):
        # Dynamo keeps the overload in its graphs, the definition is what Python calls
        _ADAPTERS[target._opoverload] = _ADAPTERS[target._opoverload.overloadpacket] = adapter


def adapter_of(*targets: Any) -> Callable[[AnyAdapter], AnyAdapter]:
    """Decorator, see :func:`register_adapter`."""

    def register(adapter: AnyAdapter) -> AnyAdapter:
        for target in targets:
            register_adapter(target, adapter)
        return adapter

    return register


def unmet_targets() -> list[str]:
    """Targets of `attention_adapter` that no forward has called so far and no warning has named."""
    return list(_unmet.values())


def warn_of_unmet() -> None:
    """Say once which targets of `attention_adapter` no forward has called so far."""
    for names in _unmet.values():
        logger.warning(
            "no forward has called %s, for which attention_adapter was used: register what the model calls itself "
            "(the function object that its module imported, not a copy or a wrapper of it)",
            names,
        )
    _unmet.clear()


def plain_target(target: Any) -> Any:
    """What a user registered, given what stands for it in Dynamo's graphs."""
    whole = getattr(target, "salad_attention", None)
    if whole is None and getattr(target, "__name__", "") == "trampoline_autograd_apply":
        # how Dynamo calls a Function that it keeps whole; private, seen in torch 2.11 and 2.13;
        # tests/salad_compile/calls/test_flash_family.py fails when it changes
        function = inspect.getclosurevars(target).nonlocals.get("fn_cls")
        whole = None if function is None else autograd_functions.applied(function)
    return target if whole is None else whole


# The same object as torch._C._nn.scaled_dot_product_attention, which is the target in Dynamo's graphs (torch 2.11 and
# 2.13; tests/salad_compile/calls/test_adapters.py fails when it changes); graphs of torch.export hold the overload.
@adapter_of(F.scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention.default)
def _scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: Any = 0.0,
    is_causal: Any = False,
    scale: Any = None,
    enable_gqa: Any = False,
) -> AttentionArguments:
    return AttentionArguments(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


_OF_C = frozenset(
    {types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType, types.MethodWrapperType}
)


def is_attention(target: Any) -> bool:
    """Whether a function, or the target of a graph node, is a known attention call."""
    try:
        # functions of C have no attributes, and are most of what a mode sees
        return (target if type(target) in _OF_C else plain_target(target)) in _ADAPTERS
    except TypeError:  # some callables cannot be hashed
        return False


def bind(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], rank: Callable[[Any], int]) -> AttentionArguments:
    """The arguments of a call of `target` in one form.

    Args:
        rank: how many dimensions one of the call's operands has; raises what it likes for what is no tensor.

    Raises:
        AdapterError: a user's adapter does not take this call, or answers something else than AttentionArguments.
    """
    target = plain_target(target)
    adapter = _ADAPTERS[target]
    _unmet.pop(adapter, None)
    try:
        arguments = adapter(*args, **kwargs)
    except Exception as error:  # whatever the user's function raises
        raise AdapterError(
            f"the attention adapter of {target} does not take this call: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(arguments, AttentionArguments):
        raise AdapterError(f"the attention adapter of {target} answered {arguments!r}, not AttentionArguments.")
    if adapter is _scaled_dot_product_attention:  # takes any rank; of others than these two `dense_reason` speaks
        return dataclasses.replace(arguments, layout="HSD") if rank(arguments.query) == 3 else arguments
    if arguments.reason:
        return arguments
    if getattr(adapter, "of_family", False) and rank(arguments.query) != len(arguments.layout):
        return dataclasses.replace(arguments, reason="its heads and samples, or its tokens, are one axis")
    _check_layout(target, arguments, rank)
    return arguments


def _check_layout(target: Any, arguments: AttentionArguments, rank: Callable[[Any], int]) -> None:
    if arguments.layout not in LAYOUTS:
        raise AdapterError(
            f"the attention adapter of {target} answered the layout {arguments.layout!r}."
            f"{did_you_mean(str(arguments.layout), LAYOUTS)} Valid: {', '.join(LAYOUTS)}."
        )
    for role in ("query", "key", "value"):
        operand = getattr(arguments, role)
        try:
            there = rank(operand)
        except Exception as error:
            raise AdapterError(
                f"the attention adapter of {target} answered {operand!r} as {role}, not a tensor of the call."
            ) from error
        if there != len(arguments.layout):
            raise AdapterError(
                f"the attention adapter of {target} says {arguments.layout}, but its {role} has {there} dimensions."
            )


def result_of(target: Any, arguments: AttentionArguments, answered: Any) -> Any:
    """The attention's tensor among what a call answered.

    Raises:
        AdapterError: it is not where the adapter says, or not shaped like the query.
    """
    several = isinstance(answered, (tuple, list))
    if several != (arguments.output is not None) or (several and not _has(answered, arguments.output)):
        what = f"{len(answered)} results" if several else "one tensor"
        raise AdapterError(
            f"the attention adapter of {target} says output={arguments.output}, but the call answered {what}."
        )
    out = answered if arguments.output is None else answered[arguments.output]
    broadcasts = arguments.by_hand or _ADAPTERS[plain_target(target)] is _scaled_dot_product_attention
    if arguments.reason or broadcasts:
        return out
    expected = (*arguments.query.shape[:-1], arguments.value.shape[-1])
    if tuple(out.shape) != expected:
        raise AdapterError(
            f"the attention adapter of {target} says {arguments.layout}, so the result should have the shape "
            f"{expected}, but it has {tuple(out.shape)}."
        )
    return out


def _has(answered: Sequence[Any], position: int | None) -> bool:
    return position is not None and 0 <= position < len(answered) and isinstance(answered[position], torch.Tensor)


def in_place_of(target: Any, arguments: AttentionArguments, result: Any) -> Any:
    """What a call of `target` would answer, with the attention's tensor only: nothing of a SALAD site has the others,
    such as a dense LSE."""
    if arguments.output is None:
        return result
    overload = target.default if isinstance(target, torch._ops.OpOverloadPacket) else target
    schema = getattr(overload, "_schema", None)
    count = arguments.results or (len(schema.returns) if schema is not None else arguments.output + 1)
    return tuple(result if position == arguments.output else None for position in range(count))


def default_scale(head_dim: int) -> float:
    """1 / sqrt(head_dim), what scaled_dot_product_attention takes when no scale is given."""
    return 1 / math.sqrt(head_dim)


def mask_kind(mask: torch.Tensor | None) -> str:
    """What an attention mask can be, by its dtype and shape: "", "keys", "square" or "other". Reads no values.

    "keys": (B, 1, 1, S) bool, the same for all queries: key padding whatever it holds. "square": (B, 1, S, S) bool:
    key padding only if its values say so.
    """
    if mask is None:
        return ""
    if mask.dtype == torch.bool and mask.dim() == 4 and _is_one(mask.shape[1]) and not _is_one(mask.shape[3]):
        return "keys" if _is_one(mask.shape[2]) else "square"
    return "other"


def _is_one(size: Any) -> bool:
    # without a guard: a symbolic size is no size of one, or Dynamo would have specialised on it
    return isinstance(size, int) and size == 1


def is_padding(mask: torch.Tensor) -> bool:
    """Whether a square bool mask (B, 1, S, S) is key padding by its values: valid queries times valid keys."""
    rows, columns = mask.any(dim=-1, keepdim=True), mask.any(dim=-2, keepdim=True)
    return mask.device.type == "meta" or bool((mask == (rows & columns)).all())


def key_padding(mask: Any, kind: str, batch: Any) -> Any:
    """bool (B, S), True where a key is valid, from a mask of this kind. For tensors and for `fx.Proxy` objects."""
    if kind == "keys":
        return mask[:, 0, 0].expand(batch, -1)
    return mask[:, 0].any(dim=-2).expand(batch, -1)


def dense_reason(
    call: AttentionArguments,
    shapes: Sequence[Sequence[Any]],
    mask: str,
    *,
    square_is_padding: bool = False,
) -> str:
    """Why a self-attention call has to stay dense whatever the model is, or the empty string (specification 4.4).

    Args:
        shapes: (B, H, S, D) of query, key and value. They may be symbolic; only what does not add guards is asked of
            them: ranks and head counts.
        mask: what :func:`mask_kind` says. square_is_padding: whether a square mask was seen to be key padding.
    """
    query_shape, key_shape, value_shape = shapes
    if call.reason:
        return call.reason
    if len(query_shape) != 4 or len(key_shape) != 4 or len(value_shape) != 4:
        return f"the query has {len(query_shape)} dimensions, not (batch, heads, tokens, head_dim)"
    if any(isinstance(size, int) and not size for size in query_shape[:3]):
        return "it has no samples, or no tokens"
    if call.is_causal:
        return "it is causal"
    if mask == "other":
        return "its attention mask is no key-padding mask: not bool, or not the same for all heads, or of one key"
    if mask == "square" and not square_is_padding:
        return "its attention mask differs from query to query"
    if key_shape[1] != value_shape[1] or query_shape[1] % key_shape[1]:
        return f"{query_shape[1]} query heads do not share {key_shape[1]} key and {value_shape[1]} value heads evenly"
    if any(_is_broadcast(query_shape[0], other[0]) for other in (key_shape, value_shape)):
        return f"its queries are of {query_shape[0]} samples, keys of {key_shape[0]} and values of {value_shape[0]}"
    if query_shape[3] != key_shape[3]:
        return "query and key have different head dimensions"
    return ""


def _is_broadcast(one: Any, other: Any) -> bool:
    # without a guard, as above: a symbolic size is no size of one, and may be that of another symbol
    return one != other if isinstance(one, int) and isinstance(other, int) else _is_one(one) or _is_one(other)


_warned_of_dropout: set[float] = set()


def warn_of_dropout(p: float) -> None:
    """Say once that the dropout of attention weights is left out: block-sparse attention has none (our choice)."""
    if p not in _warned_of_dropout:
        _warned_of_dropout.add(p)
        logger.warning("converted attention leaves out the dropout of its weights (p=%s)", p)
