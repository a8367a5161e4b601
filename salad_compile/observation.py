"""The one hook through which real tensors of a model are looked at: diagnosis, calibration, dropping, pictures.

While :func:`observe` is active, the eager twin hands each site's attention call to the callback before it computes it.
A compiled graph calls nobody, so :func:`run_observed` runs models uncompiled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from .attention import Operands, salad_of, update_of
from .branch_tensors import BranchTensors
from .config import AttentionSpec, density_permille
from .errors import ConfigError, GridMismatchError, InputsError, NotConvertedError, PatternError
from .geometry import cached_order, temporal_order, tile_order
from .inputs import normalise_inputs
from .kernels.layout import ALL_BLOCKS, block_count
from .kernels.listening import entered
from .kernels.measure import capture_selections
from .model_tree import single_model
from .token_layout import reordering, reordering_in_place, segments

if TYPE_CHECKING:
    from .branch import SaladBranch

__all__ = ["Dense", "SiteCall", "Sparse", "converted_branches", "forward_inputs", "observe", "run_observed"]

ForwardInputs = tuple[tuple[Any, ...], dict[str, Any]]


class Dense(NamedTuple):
    """Dense attention. out: (B, H, S, value head_dim). lse: (B, H, S), logarithm of the softmax denominator, fp32."""

    out: Tensor
    lse: Tensor


@dataclass(frozen=True, eq=False)
class Sparse:
    """Sparse attention: as :class:`Dense`, in the native order of the tokens, and the blocks that it computed.

    lut, count: int32 (B, H, Mq, K) and (B, H, Mq), see `salad::select_blocks`; blocks of the site's token order.
    """

    out: Tensor
    lse: Tensor
    lut: Tensor
    count: Tensor


@dataclass(frozen=True, eq=False)
class SiteCall:
    """One attention call of a converted site, and what can be computed of it; nothing of it has a gradient.

    Attributes:
        branch: of the site.
        given: query, key, value (B, H, S, head_dim) in the dtype of the call's result, each head on its own (grouped
            heads are repeated); gate; mask. Where keys have a text prefix, its queries are zeros: see :meth:`rows`.
        spec: what the site computes. scale: factor of the scores.
    """

    branch: SaladBranch
    given: Operands
    spec: AttentionSpec
    scale: float

    @property
    def video(self) -> slice:
        """Where the video lies among the S tokens."""
        where = segments(self.given.side, self.given.key.shape[2], self.given.video)
        return slice(where.video_begin, where.video_end)

    def rows(self) -> Tensor:
        """bool (B, S), the tokens that errors are measured over: the video's, without those that a mask hides.

        Text rows are dense anyway (method.md section 4.4) and would only dilute.
        """
        key, mask = self.given.key, self.given.key_mask
        rows = torch.zeros(key.shape[0], key.shape[2], dtype=torch.bool, device=key.device)
        rows[:, self.video] = True if mask is None else mask[:, self.video]
        return rows

    @torch.no_grad()
    def dense(self) -> Dense:
        """Exact softmax attention over all valid keys. Block by block: no S x S tensor is made."""
        query, key, value = self.given.query, self.given.key, self.given.value
        blocks = (self.spec.query_block, self.spec.key_block)
        shape = (*query.shape[:2], block_count(query.shape[2], blocks[0]))
        count = torch.full(shape, ALL_BLOCKS, dtype=torch.int32, device=query.device)
        unread = torch.zeros((*shape, 1), dtype=torch.int32, device=query.device)
        out, lse = torch.ops.salad.block_sparse_attention.default(
            query, key, value, unread, count, None, *blocks, self.scale, self.given.key_mask
        )
        return Dense(out, lse)

    @torch.no_grad()
    def sparse(
        self, sparsity: float | None = None, *, pattern: str | None = None, temporal_heads: Tensor | None = None
    ) -> Sparse:
        """The sparse branch alone, O_s, as the site would compute it with other settings.

        Args:
            sparsity: in [0, 1). None: the site's, as it is set now.
            pattern: "topk" or "stswa". None: the site's.
            temporal_heads: bool (H,), with "stswa" the heads whose window runs through time. None: the site's, or the
                odd heads if it has none.

        Raises:
            PatternError: "stswa" without a token grid or with a mask.
        """
        given, pattern = self.given, pattern or self.spec.pattern
        order = self._order(pattern)
        if pattern == "stswa":
            if order is None or given.key_mask is not None:
                raise PatternError(
                    f'pattern "stswa" needs the token grid and takes no mask: look at {self.branch.record.owner!r} '
                    'with "topk".'
                )
            temporal_heads = given.branch.temporal_heads if temporal_heads is None else temporal_heads
            if temporal_heads is None:
                temporal_heads = torch.arange(given.query.shape[1], device=given.query.device) % 2 == 1
        permille = density_permille(self.branch.target_sparsity if sparsity is None else sparsity)
        spec = dataclasses.replace(
            self.spec, pattern=pattern, permille=permille, linear_branch=False, adjustable=False, text=self.given.side
        )
        tensors = BranchTensors(temporal_heads=temporal_heads)
        with capture_selections() as captured:
            out = salad_of(given._replace(gate=None, mapped=None, branch=tensors, order=order), spec, self.scale)
        (selected,) = captured
        lse = self._in_native_order(selected.lse, spec, order, temporal_heads)
        return Sparse(out, lse, selected.lut, selected.count)

    @torch.no_grad()
    def update(self) -> Tensor | None:
        """What the linear branch adds, G Proj(O_l) with all scales, (B, H, S, value head_dim); None without one."""
        return update_of(self.given, self.spec) if self.spec.linear_branch else None

    def gate(self) -> Tensor | None:
        """G, (B, V, 1), or (B, V, H) with one gate per head, for the video's tokens; None without a gate."""
        return None if self.given.gate is None else self.given.gate.detach()

    def _order(self, pattern: str) -> Tensor | None:
        grid = self.branch.grid
        if pattern == self.spec.pattern or grid is None or grid.size is None or not self.branch.record.on_grid:
            return self.given.order if pattern == self.spec.pattern else None
        return cached_order(temporal_order if pattern == "stswa" else tile_order, grid.size, self.given.key.device)

    def _in_native_order(
        self, lse: Tensor, spec: AttentionSpec, order: Tensor | None, temporal_heads: Tensor | None
    ) -> Tensor:
        """Sparse attention ran with its tokens moved: into one order, or (windows) with some heads in another."""
        side, tokens = self.given.side, lse.shape[2]
        if spec.pattern == "stswa":
            assert order is not None
            assert temporal_heads is not None
            back = lse.index_select(2, reordering_in_place(order, side, tokens).inverse)
            return torch.where(temporal_heads[:, None], back, lse)
        if spec.token_order == "flat" or order is None:
            return lse
        return lse.index_select(2, reordering(order, side, tokens).inverse)


Callback = Callable[[SiteCall], None]

_observers: list[Callback] = []


def is_active() -> bool:
    """Whether somebody observes."""
    return bool(_observers)


def notify(call: SiteCall) -> None:
    """Called by the eager twin for each attention call that it replaces."""
    for observer in list(_observers):
        observer(call)


@contextlib.contextmanager
def observe(callback: Callback) -> Iterator[None]:
    """While active, each call of a converted site in an uncompiled forward is handed to `callback` before it runs."""
    with entered(_observers, callback):
        yield


# --- whole forwards ---------------------------------------------------------------------------------------------------


def converted_branches(model: Any, verb: str) -> tuple[nn.Module, list[SaladBranch]]:
    """The one model behind wrappers, and its branches in the order of its modules.

    Raises:
        ConfigError: a pipeline. NotConvertedError: nothing is converted.
    """
    from .branch import branches

    bare = single_model(model, verb)
    known = list(branches(bare).values())
    if not known:
        raise NotConvertedError(f"{type(bare).__name__} is not converted: call salad_compile.convert(model) first.")
    return bare, known


def forward_inputs(model: nn.Module, inputs: Any) -> list[ForwardInputs]:
    """The inputs of one or several forwards, checked against the model's signature.

    Args:
        inputs: a dict of keyword inputs, a tuple of positional ones, or an iterable of several such.

    Raises:
        InputsError: something else, none at all, or names that the forward does not take.
    """
    mend = "Give a dict of keyword inputs, a tuple of positional ones, or a list of several such."
    several_dicts = isinstance(inputs, tuple) and bool(inputs) and all(isinstance(each, Mapping) for each in inputs)
    if isinstance(inputs, (Mapping, tuple)) and not several_dicts:
        given = [inputs]
    elif isinstance(inputs, (str, bytes, Tensor)) or not isinstance(inputs, Iterable):
        raise InputsError(f"inputs of a forward cannot be a {type(inputs).__name__}. {mend}")
    else:
        given = list(inputs)
    if not given:
        raise InputsError(f"there are no inputs to run the model with. {mend}")
    for each in given:
        if not isinstance(each, (Mapping, tuple)):
            raise InputsError(f"inputs of a forward cannot be a {type(each).__name__}. {mend}")
    return [normalise_inputs(model, each) for each in given]


def run_observed(
    model: nn.Module, inputs: list[ForwardInputs], callback: Callable[[int, SiteCall], None], what: str
) -> None:
    """Run forwards, uncompiled, in eval mode and without gradients, and hand each site's calls to `callback`.

    Afterwards training modes and switches are as they were. On a terminal a bar on stderr counts the sites.

    Args:
        model: a converted model without wrappers around the whole.
        callback: takes the number of the forward and the call.
        what: one word for the bar.

    Raises:
        InputsError: a forward fails, or a converted site does not run in it.
    """
    from .branch import branches

    owners = {branch.record.owner for branch in branches(model).values()}
    with _prepared(model), _progress(what, len(inputs) * len(owners)) as advance, torch.no_grad():
        for number, given in enumerate(inputs):
            watch = _Watch(number, callback, advance)
            _run_one(model, given, watch)
            if missing := sorted(owners - watch.seen):
                raise InputsError(
                    f"inputs number {number} ran the model without its converted sites {', '.join(missing[:3])}"
                    f"{' and more' if len(missing) > 3 else ''}. Give inputs with which all of them run."
                )


class _Watch:
    """Hands the calls of one forward on, and remembers which sites came and whether the callback failed."""

    def __init__(self, number: int, callback: Callable[[int, SiteCall], None], advance: Callable[[], None]) -> None:
        self.number, self.callback, self.advance = number, callback, advance
        self.seen: set[str] = set()
        self.failed = False

    def __call__(self, call: SiteCall) -> None:
        self.seen.add(call.branch.record.owner)
        try:
            self.callback(self.number, call)
        except BaseException:
            self.failed = True
            raise
        self.advance()


def _run_one(model: nn.Module, given: ForwardInputs, watch: _Watch) -> None:
    args, kwargs = given
    try:
        with observe(watch):
            model(*args, **kwargs)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
        if watch.failed or isinstance(error, torch.OutOfMemoryError) or not _is_of_inputs(error):
            raise
        raise InputsError(_failure(model, watch.number, args, kwargs, error)) from error


def _is_of_inputs(error: Exception) -> bool:
    """Our own errors say what to do; of them, only the grid's is about inputs."""
    from .errors import SaladError

    return isinstance(error, GridMismatchError) or not isinstance(error, SaladError)


def _failure(model: nn.Module, number: int, args: tuple[Any, ...], kwargs: Mapping[str, Any], error: Exception) -> str:
    named = {**{str(position): value for position, value in enumerate(args)}, **kwargs}
    shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in named.items() if isinstance(value, Tensor))
    return (
        f"the forward of {type(model).__name__} failed with inputs number {number} (tensors: {shapes or 'none'}): "
        f"{type(error).__name__}: {error}\nGive inputs as one denoising step of this model takes them, on its device "
        "and in its dtype."
    )


@contextlib.contextmanager
def _prepared(model: nn.Module) -> Iterator[None]:
    """Eval mode, SALAD switched on at all sites, and nothing compiled."""
    from .branch import branches, held_dense

    known = branches(model).values()
    if any(branch.group for branch in known):
        raise ConfigError("look at a model before its tokens are split over processes (parallelise), not afterwards.")
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        # before Dynamo was loaded nothing can be compiled, and loading it takes seconds
        eager = _forced_eager() if "torch._dynamo" in sys.modules else contextlib.nullcontext()
        with held_dense(known, False), eager:
            yield
    finally:
        for module in training:
            module.training = True


def _forced_eager() -> contextlib.AbstractContextManager[Any]:
    stance: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


@contextlib.contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar on stderr if that is a terminal; yields what moves it on by one site."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda: progress.advance(task)
