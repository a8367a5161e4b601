"""The hooks by which a converted site takes part in its model's forward, and the models' branches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from salad_compile.common.foreign_hooks import forward_slot
from salad_compile.common.projections import projection_call
from salad_compile.common.signatures import argument_names
from salad_compile.config import SaladConfig
from salad_compile.errors import require_conversion
from salad_compile.grid.video_grid import backward_pass
from salad_compile.sites import frozen_warning, graph_breaks
from salad_compile.sites.eager_mode import SaladMode, running
from salad_compile.sites.markers import NO_ORDER, tag_dense
from salad_compile.sites.outside_owner import no_tensor_error, recomputed_error, replaced_error
from salad_compile.sites.parameters import Projections
from salad_compile.sites.record import SiteRecord
from salad_compile.sites.site import Site

# Name of the submodule that a converted attention module gets. No other key of the base model's state dict changes.
BRANCH_NAME = "salad"
_UNSAID: Any = object()


class SaladBranch(Site):
    """One site, hung on its owner as `.salad`: hooks on the owner's projections, and a forward around the owner's.

    Arguments are those of :class:`salad_compile.sites.parameters.BranchParameters`.
    """

    def __init__(self, record: SiteRecord, config: SaladConfig, projections: Projections) -> None:
        super().__init__(record, config, projections)
        self.detached = False  # while the owner runs with the forward that it had
        self.text_position = 0  # of the owner's argument that tells how much is text
        # a tuple, because an attribute that is a module would be registered as a child
        self._original: tuple[Callable[..., Any], tuple[nn.Module, ...]] | None = None

    # --- hooks: bound methods, so that deepcopy and pickle rebind them to the copied branch --------------------------

    def attach(self, owner: nn.Module, modules: Mapping[str, nn.Module]) -> None:
        """Hang this branch on `owner`; `modules` maps the first role of each projection to its module.

        Chains whatever `forward` the instance already has, inside of the hooks of accelerate and diffusers: these
        move weights, or skip a forward whose result they have cached, and when they are removed ours must stay.
        """
        # The class's function and not a bound method: Dynamo does not look `forward` up on a class that diffusers
        # allows in graphs, and a bound method would unpickle as whatever `owner.forward` is by then.
        slot = forward_slot(owner)
        chained = slot.get()
        self._original = (type(owner).forward, (owner,)) if chained is None else (chained, ())
        owner.add_module(BRANCH_NAME, self)
        hooks = {
            "query": self.on_query,
            "key": self.on_key,
            "value": self.on_value,
            "out": self.on_out,
            "text_query": self.on_text_query,
            "text_key": self.on_text_key,
            "text_value": self.on_text_value,
            "text_out": self.on_text_out,
        }
        for role, module in modules.items():
            module.register_forward_hook(hooks[role], with_kwargs=True)
        names = argument_names(owner.forward)
        if self.record.text_argument in names:
            self.text_position = names.index(self.record.text_argument)
        self.owner_class = type(owner)
        slot.set(self.run_owner)
        graph_breaks.remember(self)

    def detach_forward(self, owner: nn.Module) -> Callable[[], None]:
        """Give the owner back the forward that it had; the hooks stay. The result undoes it."""
        assert self._original is not None
        original, bound = self._original
        slot = forward_slot(owner)
        ours = slot.get()
        self.detached = True
        slot.set(None if bound else original)

        def undo() -> None:
            slot.set(ours)
            self.detached = False

        return undo

    def _change(
        self,
        change: Callable[[str, Tensor, Tensor], Tensor],
        first: str,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        returned: Any,
    ) -> Any:
        """What a projection returned, with its result changed. change: its first role, input and output -> output."""
        if returned is _UNSAID:  # whoever put another module in the projection's place took the hook with it, but not
            kwargs, returned = {}, kwargs  # that it wants keywords (torch.ao.quantization)
        if (
            type(module) is nn.Linear
            and len(args) == 1
            and isinstance(returned, Tensor)
            and isinstance(args[0], Tensor)
        ):
            return change(first, args[0], returned)  # by far the most, without what the others need
        call = projection_call(module, args, kwargs, returned)
        if call is None:
            raise no_tensor_error(self.record.owner, first, returned)
        return call.rebuild(change(first, call.x, call.out))

    def on_query(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any, out: Any = _UNSAID) -> Any:
        """Forward hook of the query (or fused) projection: its update, then the tag or, uncompiled, arming."""
        return self._change(self._begin, "query", module, args, kwargs, out)

    def _begin(self, first: str, x: Tensor, out: Tensor) -> Tensor:
        """The query projection ran."""
        if not torch.compiler.is_compiling():
            mode = running(self)
            if mode is not None:
                self._require_gradients(mode)
                return mode.run_query(self.add_updates, first, x, out)
            if not self.switch.dense and not self.detached:
                self._require_owner()
            return self.add_updates(first, x, out)
        out = self.add_updates(first, x, out)
        if self.switch.dense:
            return tag_dense(x, out)
        tensors = [self.mark, *self.tensors().values()]
        order = self.order(out.device)
        spec = NO_ORDER if self.lacks_order(order) else self.spec
        tagged: Tensor = torch.ops.salad.tag(out, x, tensors, order, spec)
        return tagged

    def _require_gradients(self, mode: SaladMode) -> None:
        """Raises SiteLostError where the owner's forward switches gradients off on the way, to run again later."""
        assert self._original is not None
        lost = mode.began_with_gradients and not torch.is_grad_enabled()
        lost = lost and any(p.requires_grad for p in self.parameters())
        if lost and not hasattr(self._original[0], "__wrapped__"):  # a decorated forward wants none
            raise recomputed_error(self.record.owner)

    def _require_owner(self) -> None:
        """Raises SiteLostError where the query projection alone shows that the attention would be dense."""
        if backward_pass() is not None:
            raise recomputed_error(self.record.owner)
        if self.grid is not None and self.grid.running.orders is not None:
            raise replaced_error(self.record.owner)

    def _add_source(self, first: str, x: Tensor, out: Tensor) -> Tensor:
        """Add the updates, and tell that position is to be found in what becomes of the result."""
        if torch.compiler.is_compiling():
            out = self.add_updates(first, x, out)
            if self.maps_before_position and not self.switch.dense:
                marked: Tensor = torch.ops.salad.projected(out)
                return marked
            return out
        mode = running(self)
        if mode is None:
            return self.add_updates(first, x, out)
        return mode.run_projection(self.add_updates, first, x, out)

    def _add_updates(self, first: str, x: Tensor, out: Tensor) -> Tensor:
        """Add the updates of a projection in which position is not looked for."""
        mode = None if torch.compiler.is_compiling() else running(self)
        if mode is None:
            return self.add_updates(first, x, out)
        return mode.run_updates(self.add_updates, first, x, out)

    def on_key(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any, out: Any = _UNSAID) -> Any:
        """Forward hook of the key projection, unless it is the query's."""
        return self._change(self._add_source, "key", module, args, kwargs, out)

    def on_value(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any, out: Any = _UNSAID) -> Any:
        """Forward hook of the value projection, unless it is the query's or the key's."""
        return self._change(self._add_updates, "value", module, args, kwargs, out)

    def on_out(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any, out: Any = _UNSAID) -> Any:
        """Forward hook of the output projection."""
        return self._change(self._add_updates, "out", module, args, kwargs, out)

    def on_text_query(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any, out: Any = _UNSAID) -> Any:
        """Forward hook of the text stream's query (or fused) projection."""
        return self._change(self._add_source, "text_query", module, args, kwargs, out)

    def on_text_key(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any, out: Any = _UNSAID) -> Any:
        """Forward hook of the text stream's key projection."""
        return self._change(self._add_source, "text_key", module, args, kwargs, out)

    def on_text_value(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any, out: Any = _UNSAID) -> Any:
        """Forward hook of the text stream's value projection."""
        return self._change(self._add_updates, "text_value", module, args, kwargs, out)

    def on_text_out(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any, out: Any = _UNSAID) -> Any:
        """Forward hook of the text stream's output projection."""
        return self._change(self._add_updates, "text_out", module, args, kwargs, out)

    def run_owner(self, *args: Any, **kwargs: Any) -> Any:
        """What stands in the place of the owner's forward.

        It calls this module, so that hooks that move parameters into place for their module's forward do so for ours.
        """
        # not in graphs: they name modules by the way to their call, and this way is none of the model's
        return self.forward(*args, **kwargs) if torch.compiler.is_compiling() else self(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The owner's forward. Compiled: the original, announced to the passes. Uncompiled: under the eager twin."""
        if not torch.compiler.is_compiling():
            frozen_warning.tell(self)
        if self.switch.dense:
            return self._run_original(*args, **kwargs)
        if torch.compiler.is_compiling() and not self.uncompiled:
            torch.ops.salad.site(self.mark, self._text(args, kwargs))
        return self.run_announced(*args, **kwargs)

    def run_announced(self, *args: Any, **kwargs: Any) -> Any:
        """The second half of :meth:`forward`.

        A function of its own: after a graph break inside the owner it is a frame of its own, and by then the passes
        have seen the marker alone and set `uncompiled`.
        """
        if not torch.compiler.is_compiling():
            return self._run_eagerly(*args, **kwargs)
        if self.uncompiled:
            return self.run_uncompiled(*args, **kwargs)
        return self._run_original(*args, **kwargs)

    def _run_original(self, *args: Any, **kwargs: Any) -> Any:
        assert self._original is not None
        original, bound = self._original
        return original(*bound, *args, **kwargs)

    def _run_eagerly(self, *args: Any, **kwargs: Any) -> Any:
        return self._run_under(SaladMode(self, self._text(args, kwargs)), *args, **kwargs)

    def _run_under(self, mode: SaladMode, *args: Any, **kwargs: Any) -> Any:
        with mode:
            out = self._run_original(*args, **kwargs)
        mode.require_replaced()
        return out

    def run_uncompiled(self, *args: Any, **kwargs: Any) -> Any:
        """Under the eager twin, also while compiling: `graph_breaks` hides it from Dynamo before it is ever called."""
        mode = SaladMode(self, self._text(args, kwargs), graph_breaks.definition_of(self))
        return self._run_under(mode, *args, **kwargs)

    def _text(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        """The argument of the owner that has as many tokens as there is text, (B, text, C), or None."""
        name = self.record.text_argument
        if name is None:
            return None
        text: Tensor = kwargs[name] if name in kwargs else args[self.text_position]
        return text

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.uncompiled:
            graph_breaks.hide_from_dynamo(type(self))
        graph_breaks.remember(self)  # a copy of an attached branch


def branches(model: nn.Module) -> dict[str, SaladBranch]:
    """Name of the branch module -> branch, in the order of the model's modules."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SaladBranch)}


def base_parameters(model: nn.Module) -> int:
    """How many parameters a model has that no conversion added."""
    added = sum(p.numel() for branch in branches(model).values() for p in branch.parameters())
    return sum(p.numel() for p in model.parameters()) - added


def branches_in(modules: Mapping[str, nn.Module]) -> list[tuple[str, SaladBranch]]:
    """The branches of a model's or a pipeline's modules, each with the name of its module.

    Raises:
        NotConvertedError: there are none.
    """
    found = [(name, branch) for name, module in modules.items() for branch in branches(module).values()]
    require_conversion(bool(found), " and ".join(dict.fromkeys(type(module).__name__ for module in modules.values())))
    return found
