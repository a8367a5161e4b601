"""The parameters of one converted site, and the hooks by which they take part in the model's forward."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from salad_compile.config import AttentionSpec, SaladConfig, density_permille
from salad_compile.definition.branch_tensors import BranchTensors
from salad_compile.errors import ConfigError, NotConvertedError
from salad_compile.grid.video_grid import VideoGrid
from salad_compile.position.recording import PositionRecording
from salad_compile.sites import frozen_warning as frozen
from salad_compile.sites import graph_breaks as split_frames
from salad_compile.sites.eager_mode import SaladMode
from salad_compile.sites.markers import leave_dense
from salad_compile.sites.record import SiteRecord


class DenseSwitch:
    """Whether the sites of a model compute dense attention just now; one object for each model."""

    def __init__(self) -> None:
        self.dense = False  # not of the class: Dynamo would guard on where it was found


# Name of the submodule that a converted attention module gets. No other key of the base model's state dict changes.
BRANCH_NAME = "salad"


class SaladBranch(nn.Module):
    """Gate, projection and low-rank updates of ONE site, hung on its owner as `.salad`.

    Everything is a bare `nn.Parameter`: peft's `target_modules="all-linear"` would wrap an `nn.Linear` in here and
    rename its keys, and its suffix matching would hit child modules called `q`.

    The projection starts at zero, so a freshly converted model computes pure block-sparse attention; the gate starts at
    sigmoid(0) = 0.5, because two factors that both start at zero would never train (specification 3).

    Args:
        record: the site. config: the configuration; both are kept, shared between the sites of a model.
        widths: role -> (in_features, out_features of this role) of the projections that get a low-rank update.
        shares: role -> out_features of this role, of all projections that serve several.
        gate_width: C, the width of the input of the query projection.
        dtype, device: of the parameters.
    """

    lora_scale: Tensor
    permille: Tensor
    temporal_heads: Tensor

    def __init__(
        self,
        record: SiteRecord,
        config: SaladConfig,
        *,
        gate_width: int,
        widths: Mapping[str, tuple[int, int]],
        shares: Mapping[str, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.record = record
        self.config = config
        self.group = ""  # of the processes that share the tokens
        self.spec = self._spec_of_site().encode()
        self.roles = record.shared_roles()
        self.shares = dict(shares)
        self.grid: VideoGrid | None = None  # shared by the sites of a model
        self.switch = DenseSwitch()  # likewise
        self.text_position = 0  # of the owner's argument that tells how much is text
        self.uncompiled = False  # set when a graph break inside the owner's forward was seen
        self.measured_sparsity: float | None = None
        self.lora_merged = False  # then the branch fits only the base that holds its update
        self.recording: PositionRecording | None = None  # while the eager twin runs, where position is replayed
        self.armed: Tensor | None = None  # the gate's input, between the query projection and the attention call
        # a tuple, because an attribute that is a module would be registered as a child
        self._original: tuple[Callable[..., Any], tuple[nn.Module, ...]] | None = None

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=device))

        heads, width = record.heads, record.width
        gates: tuple[int, ...] = (heads,) if config.gate == "head" else ()
        shapes: dict[str, tuple[int, ...]] = {
            "gate_weight": (gate_width, *gates),
            "gate_bias": gates or (1,),
            "proj_weight": (width, width),
            "proj_bias": (width,),
            "layer_scale": (),
            "head_scale": (heads,),
        }
        self.windowed = self.decoded_spec().pattern == "stswa"
        self.maps_before_position = self.decoded_spec().maps_before_position
        self.branch_names = BranchTensors.names(self.decoded_spec())
        for name in self.branch_names:
            if name in shapes:
                self.register_parameter(name, empty(*shapes[name]))
        if "permille" in self.branch_names:
            self.register_buffer("permille", torch.empty((), dtype=torch.int32, device=device))
        if "temporal_heads" in self.branch_names:
            self.register_buffer("temporal_heads", torch.empty(heads, dtype=torch.bool, device=device))
        self.lora_roles = tuple(widths) if config.lora_rank else ()
        for role in self.lora_roles:
            in_features, out_features = widths[role]
            self.register_parameter(f"lora_{role}_down", empty(config.lora_rank, in_features))
            self.register_parameter(f"lora_{role}_up", empty(out_features, config.lora_rank))
        # a tensor, because a Python number in a graph recompiles when it changes; fp32 whatever the parameters are
        self.register_buffer("lora_scale", torch.empty((), dtype=torch.float32, device=device))
        self.reset_parameters()

    def _spec_of_site(self) -> AttentionSpec:
        record, own = self.record, self.config.of_site(self.record.owner)
        return dataclasses.replace(
            self.config.spec,
            pattern=own.pattern,
            linear_branch=own.linear_branch and not record.dropped,
            rope_placement="rotate-then-map" if record.rotated_first else self.config.spec.rope_placement,
            text=record.text,
            single=record.text in ("before", "after") and record.text_query is None,
            groups=record.groups,
            square_mask=record.square_mask,
            group=self.group,
        )

    def reset_parameters(self) -> None:
        """Initialise: zero, but Kaiming uniform for LoRA's `down` and 1 for static scales (specification 6)."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.endswith("_down"):
                    nn.init.kaiming_uniform_(parameter, a=5**0.5)
                elif name.endswith("_scale"):
                    parameter.fill_(1.0)
                else:
                    parameter.zero_()
            self.lora_scale.fill_(self.config.lora_scale)
            if "permille" in self.branch_names:
                self.permille.fill_(density_permille(self.config.of_site(self.record.owner).sparsity))
            if "temporal_heads" in self.branch_names:  # odd heads look through time (specification 4.3)
                self.temporal_heads.copy_(torch.arange(self.record.heads) % 2 == 1)

    def decoded_spec(self) -> AttentionSpec:
        """What this site computes."""
        return AttentionSpec.decode(self.spec)

    @property
    def target_sparsity(self) -> float:
        """The sparsity asked for: what was set last, or the configuration's for this site."""
        if "permille" in self.branch_names and self.permille.device.type != "meta":
            return 1 - int(self.permille) / 1000
        return self.config.of_site(self.record.owner).sparsity

    def tensors(self) -> BranchTensors:
        """What the definition takes of this branch."""
        return BranchTensors(**{name: getattr(self, name) for name in self.branch_names})

    def drop_linear(self) -> None:
        """Give up gate, projection and static scales, in place (specification 7); sparse attention and LoRA stay.

        Compiled code finds other settings here, and is compiled again once for all sites that are alike.
        """
        for name in self.linear_parameters():
            delattr(self, name)
        self.record = dataclasses.replace(self.record, dropped=True)
        spec = self._spec_of_site()
        self.spec, self.branch_names = spec.encode(), BranchTensors.names(spec)
        self.maps_before_position = spec.maps_before_position

    def share_tokens(self, group: str) -> None:
        """The tokens are split over these processes from now on (context_parallel.py)."""
        self.group = group
        self.spec = self._spec_of_site().encode()

    def linear_parameters(self) -> dict[str, nn.Parameter]:
        """What only the linear branch needs, by name; nothing where there is none."""
        without = BranchTensors.names(dataclasses.replace(self.decoded_spec(), linear_branch=False))
        return {name: getattr(self, name) for name in self.branch_names if name not in without}

    @property
    def mark(self) -> Tensor:
        """A tensor that every branch has, of its own: by it the markers in a graph know each other."""
        return self.lora_scale

    # --- hooks: bound methods, so that deepcopy and pickle rebind them to the copied branch --------------------------

    def attach(self, owner: nn.Module, modules: Mapping[str, nn.Module]) -> None:
        """Hang this branch on `owner`; `modules` maps the first role of each projection to its module.

        Chains whatever `forward` the instance already has: accelerate's and diffusers' hooks put theirs there too.
        """
        # The class's function and not a bound method: Dynamo does not look `forward` up on a class that diffusers
        # allows in graphs, and a bound method would unpickle as whatever `owner.forward` is by then.
        chained = owner.__dict__.get("forward")
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
            module.register_forward_hook(hooks[role])
        names = list(inspect.signature(owner.forward).parameters)
        if self.record.text_argument is not None:
            self.text_position = names.index(self.record.text_argument)
        self.owner_class = type(owner)
        owner.forward = self.run_owner
        split_frames.remember(self)

    def detach_forward(self, owner: nn.Module) -> None:
        """Give the owner back the forward that it had; the hooks stay."""
        assert self._original is not None
        original, bound = self._original
        owner.__dict__.pop("forward")
        if not bound:
            owner.forward = original

    def on_query(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        """Forward hook of the query (or fused) projection: its update, then the tag or, uncompiled, arming."""
        out = self._update("query", args[0], out)
        if self.switch.dense:
            return leave_dense(module, args, out)
        if torch.compiler.is_compiling():
            tensors = [self.mark, *self.tensors().flat()]
            tagged: Tensor = torch.ops.salad.tag(out, args[0], tensors, self.order(out.device), self.spec)
            return tagged
        self.armed = args[0]
        return self._projected(args[0], out)

    def _projected(self, x: Tensor, out: Tensor) -> Tensor:
        """Tell where a value comes from whose position is to be found."""
        if not self.maps_before_position or self.switch.dense:
            return out
        if torch.compiler.is_compiling():
            marked: Tensor = torch.ops.salad.projected(out)
            return marked
        if self.recording is not None:
            self.recording.add_projection(x, out)
        return out

    def order(self, device: torch.device) -> Tensor | None:
        """int32 (2, V), the order of the video's tokens and its inverse; None where the grid is not known."""
        if self.grid is None or not self.record.on_grid:
            return None
        order = self.grid.temporal_order if self.windowed else self.grid.order
        # the arguments of the root may lie elsewhere than this layer
        return order if order is None or order.device == device else order.to(device)

    def on_key(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        """Forward hook of the key projection, unless it is the query's."""
        return self._projected(args[0], self._update("key", args[0], out))

    def on_value(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        """Forward hook of the value projection, unless it is the query's or the key's."""
        return self._update("value", args[0], out)

    def on_out(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        """Forward hook of the output projection."""
        return self._update("out", args[0], out)

    def on_text_query(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        """Forward hook of the text stream's query (or fused) projection."""
        return self._projected(args[0], self._update("text_query", args[0], out))

    def on_text_key(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        """Forward hook of the text stream's key projection."""
        return self._projected(args[0], self._update("text_key", args[0], out))

    def on_text_value(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        """Forward hook of the text stream's value projection."""
        return self._update("text_value", args[0], out)

    def on_text_out(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        """Forward hook of the text stream's output projection."""
        return self._update("text_out", args[0], out)

    def run_owner(self, *args: Any, **kwargs: Any) -> Any:
        """The owner's forward. Compiled: the original, announced to the passes. Uncompiled: under the eager twin."""
        if not torch.compiler.is_compiling():
            frozen.tell(self)
        if self.switch.dense:
            return self._run_original(*args, **kwargs)
        if torch.compiler.is_compiling() and not self.uncompiled:
            torch.ops.salad.site(self.mark, self._text(args, kwargs))
        return self.run_announced(*args, **kwargs)

    def run_announced(self, *args: Any, **kwargs: Any) -> Any:
        """The second half of :meth:`run_owner`.

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
        mode = SaladMode(self, self._text(args, kwargs))
        self.recording = mode.recording
        try:
            with mode:
                out = self._run_original(*args, **kwargs)
        finally:
            self.armed = self.recording = None  # a tensor left here would keep its graph alive and break deepcopy
        mode.require_replaced()
        return out

    def run_uncompiled(self, *args: Any, **kwargs: Any) -> Any:
        """Under the eager twin, also while compiling: `split_frames` hides it from Dynamo before it is ever called."""
        return self._run_eagerly(*args, **kwargs)

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
            split_frames.hide_from_dynamo(type(self))
        split_frames.remember(self)  # a copy of an attached branch

    def _update(self, group: str, x: Tensor, out: Tensor) -> Tensor:
        """Add the low-rank update of each role that the projection serves to its share of the output.

        Added to the output and not to the weight, so that quantised and wrapped projections work.
        """
        roles = self.roles[group]
        if not any(role in self.lora_roles for role in roles):
            return out
        if len(roles) == 1:
            return out + self._low_rank(roles[0], x).to(out.dtype)
        shares = torch.split(out, [self.shares[role] for role in roles], dim=-1)
        updated = [
            share + self._low_rank(role, x).to(out.dtype) if role in self.lora_roles else share
            for role, share in zip(roles, shares, strict=True)
        ]
        return torch.cat(updated, dim=-1)

    def _low_rank(self, role: str, x: Tensor) -> Tensor:
        down, up = (getattr(self, f"lora_{role}_{part}") for part in ("down", "up"))
        # a copy: what a cast answers that does nothing stands for the mark itself in graphs of torch.export
        scale = self.lora_scale.to(x.dtype, copy=True)
        return F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype)) * scale

    def extra_repr(self) -> str:
        """One line for `print(model)`: torchao's users complain that a printed model tells nothing."""
        config = self.config
        lora = f"lora_rank={config.lora_rank} on {'/'.join(self.lora_roles)}" if self.lora_roles else "no lora"
        dropped = ", linear branch dropped" if self.record.dropped else ""
        blocks = f"{config.query_block}x{config.key_block} blocks"
        return f"{config.pattern}, sparsity={config.sparsity}, {blocks}, {lora}{dropped}"


def require_switchable(known: Iterable[SaladBranch], dense: bool) -> None:
    """Raises ConfigError where dense attention would see the tokens of one process alone."""
    if dense and any(branch.group for branch in known):
        raise ConfigError("sites whose tokens are split over processes (parallelise) cannot be dense for a while.")


@contextlib.contextmanager
def held_dense(known: Iterable[SaladBranch], on: bool) -> Iterator[None]:
    """The switches of some sites in one position; afterwards they are as they were. Raises ConfigError."""
    known = list(known)
    require_switchable(known, on)
    before = {branch.switch: branch.switch.dense for branch in known}
    for switch in before:
        switch.dense = on
    try:
        yield
    finally:
        for switch, was in before.items():
            switch.dense = was


def branches(model: nn.Module) -> dict[str, SaladBranch]:
    """Name of the branch module -> branch, in the order of the model's modules."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SaladBranch)}


def branches_in(modules: Mapping[str, nn.Module]) -> list[tuple[str, SaladBranch]]:
    """The branches of a model's or a pipeline's modules, each with the name of its module.

    Raises:
        NotConvertedError: there are none.
    """
    found = [(name, branch) for name, module in modules.items() for branch in branches(module).values()]
    if not found:
        raise NotConvertedError("nothing here is converted: call salad_compile.convert(model) first.")
    return found
