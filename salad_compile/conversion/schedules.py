"""What may change after conversion without compiling again: the sparsity, and whether attention is dense just now.

The sparsity is data, an int32 tensor of each site that the operators read. Dense or not is a switch that all sites of a
model share; compiled code exists once for either position.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch

from salad_compile.common.wrappers import bare_components
from salad_compile.definition.spec import density_permille
from salad_compile.errors import ConfigError, did_you_mean
from salad_compile.sites.branch import SaladBranch, branches_in
from salad_compile.sites.site import hold_dense, require_switchable


def set_sparsity(model: Any, sparsity: float | Mapping[str, float]) -> None:
    """Set the sparsity of converted sites, uncompiled or compiled, without compiling again.

    Args:
        model: a converted model (wrapped or not) or pipeline, with `lowest_sparsity` in its configuration.
        sparsity: of all sites, or glob of site names -> of those sites. Of several globs the last counts.

    Raises:
        ConfigError: the configuration fixes the sparsity, a value lies below its `lowest_sparsity` or outside [0, 1),
            or a glob matches no site. Then nothing is set.
        NotConvertedError: nothing is converted.
    """
    known = _branches(model)
    wanted: dict[SaladBranch, float] = {}
    for glob, value in (sparsity if isinstance(sparsity, Mapping) else {"*": sparsity}).items():
        names = [branch.record.owner for branch in known]
        matching = [branch for branch in known if fnmatchcase(branch.record.owner, glob)]
        if not matching:
            raise ConfigError(f"{glob!r} matches no converted site.{did_you_mean(glob, names)}")
        wanted.update(dict.fromkeys(matching, value))
    _set(wanted)


def ramp_sparsity(model: Any, progress: float) -> None:
    """Warm up: from `lowest_sparsity` at progress 0, in proportion, to each site's own sparsity at progress 1.

    Args:
        model: see :func:`set_sparsity`. progress: clipped to [0, 1]; training steps taken by those of the warm-up, say.
    """
    progress = min(max(progress, 0.0), 1.0)
    wanted = {}
    for branch in _branches(model):
        target = branch.config.of_site(branch.record.owner).sparsity
        lowest = branch.config.lowest_sparsity
        start = target if lowest is None else lowest
        wanted[branch] = start + progress * (target - start)
    _set(wanted)


def _set(wanted: Mapping[SaladBranch, float]) -> None:
    """All of them, or none and an error."""
    for branch, sparsity in wanted.items():
        _require_adjustable(branch, sparsity)
    with torch.no_grad():
        for branch, sparsity in wanted.items():
            branch.permille.fill_(density_permille(sparsity))


def set_dense(model: Any, on: bool) -> None:
    """Let every converted site compute dense softmax attention, as the base model does, or SALAD again.

    Low-rank updates of the projections stay: after :func:`salad_compile.merge_lora` nothing could take them away.

    Raises:
        NotConvertedError: nothing is converted. ConfigError: the tokens are split over processes (`parallelise`) that
            do not divide the heads.
    """
    known = _branches(model)
    require_switchable(known, on)
    for switch in {branch.switch for branch in known}:
        switch.turn(on)


@contextlib.contextmanager
def dense(model: Any) -> Iterator[None]:
    """`with dense(model):` see :func:`set_dense`; afterwards every site is as it was before."""
    with hold_dense(_branches(model), True):
        yield


class DenseSteps:
    """Keeps the first denoising steps dense, by number or by timestep. Off by default: see specification 4.4.

    Of a diffusers pipeline it is the `callback_on_step_end`; in a loop of your own call :meth:`before` each step.

    Args:
        model: a converted model or pipeline. steps: so many steps, from the first, are dense.
        above: steps with a timestep of at least this are dense.

    Raises:
        ConfigError: neither or both are given. NotConvertedError: nothing is converted.
    """

    def __init__(self, model: Any, steps: int | None = None, *, above: float | None = None) -> None:
        if (steps is None) == (above is None):
            raise ConfigError("DenseSteps takes steps= (how many) or above= (a timestep), and one of them.")
        self.model, self.steps, self.above = model, steps, above
        self.before(0, float("inf"))

    def before(self, step: int, timestep: float) -> None:
        """Call it before step number `step`, counted from 0, at that timestep."""
        is_dense = step < self.steps if self.steps is not None else self.above is not None and timestep >= self.above
        set_dense(self.model, is_dense)

    def __call__(self, pipe: Any, step: int, timestep: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        """After step number `step` of a diffusers pipeline: sets the next step, or the first of the next video."""
        timesteps = pipe.scheduler.timesteps
        following = step + 1 if step + 1 < len(timesteps) else 0
        # reading a timestep may wait for the device
        self.before(following, float(timesteps[following]) if self.steps is None else 0.0)
        return inputs


def _branches(model: Any) -> list[SaladBranch]:
    return [branch for _, branch in branches_in(bare_components(model))]


def _require_adjustable(branch: SaladBranch, sparsity: float) -> None:
    spec = branch.decoded_spec()
    if not spec.adjustable:
        raise ConfigError(
            f"the sparsity of {branch.record.owner!r} is fixed at {branch.config.sparsity}: convert with "
            "SaladConfig(lowest_sparsity=...), the lowest that will be asked for."
        )
    lowest = 1 - spec.permille / 1000
    if not isinstance(sparsity, (int, float)) or not 0 <= sparsity < 1 or density_permille(sparsity) > spec.permille:
        raise ConfigError(
            f"sparsity of {branch.record.owner!r} must lie between {lowest:g}, the lowest_sparsity of its conversion, "
            f"and 1, got {sparsity!r}."
        )
