"""calibrate(model, inputs, target=...) and calibrate_heads(model, inputs): settings chosen by measurement."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
import torch.nn as nn
from torch import Tensor

from salad_compile.analysis.diagnosis import distance, recall_of
from salad_compile.analysis.forwards import converted_branches, forward_inputs, run_observed
from salad_compile.analysis.site_call import SiteCall
from salad_compile.common.checks import check_choice
from salad_compile.common.reports import Report, Row
from salad_compile.common.wrappers import single_model
from salad_compile.config import SaladConfig
from salad_compile.conversion.cost import SiteCost, site_cost
from salad_compile.conversion.schedules import set_sparsity
from salad_compile.errors import ConfigError
from salad_compile.sites.branch import SaladBranch, branches

Measure: TypeAlias = Literal["error", "recall"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
# Our choice: fine where the paper works (0.9), coarse where training-free methods do (0.5).
SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)


# --- the order of each head (ST-SWA) ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class CalibratedHeads:
    """One site: for each head the measure with its window in space and through time, and what was chosen."""

    name: str
    spatial: tuple[float, ...]
    temporal: tuple[float, ...]
    before: tuple[bool, ...]
    through_time: tuple[bool, ...]


@dataclass(frozen=True, repr=False)
class HeadCalibration(Report):
    """What :func:`calibrate_heads` measured and chose."""

    sites: tuple[CalibratedHeads, ...]
    measure: Measure

    title = "windows of heads"
    columns = ("site", "through time", "changed", "measure before", "measure now")

    def rows(self) -> list[Row]:
        return [
            (
                site.name or "(model)",
                " ".join(str(head) for head, chosen in enumerate(site.through_time) if chosen) or "none",
                str(sum(a != b for a, b in zip(site.before, site.through_time, strict=True))),
                f"{_mean_of(site, site.before):.4f}",
                f"{_mean_of(site, site.through_time):.4f}",
            )
            for site in self.sites
        ]

    def notes(self) -> list[str]:
        what = {
            "error": "relative mean squared error of sparse attention against dense",
            "recall": "share of the dense softmax mass that is computed",
        }[self.measure]
        return [f"measure: {what}, mean over heads. Heads that are not named have their window in space."]

    def to_dict(self) -> dict[str, Any]:
        return {"measure": self.measure, "sites": [dataclasses.asdict(site) for site in self.sites]}


def _mean_of(site: CalibratedHeads, through_time: Sequence[bool]) -> float:
    chosen = [t if c else s for s, t, c in zip(site.spatial, site.temporal, through_time, strict=True)]
    return sum(chosen) / len(chosen)


def calibrate_heads(model: Any, inputs: Any, *, measure: Measure = "error") -> HeadCalibration:
    """Choose for each head of the sites with sliding windows whether its window runs in space or through time.

    The order of lower relative MSE of O_s against dense attention, mean over the inputs (specification 4.3); a tie
    stays in space. All sites are measured in the model as it was before. Sets the pattern's `head_choice` of each
    branch in place ("stswa": `temporal_heads`), which `save` stores. Compiled code reads it as data and is not compiled
    again.

    Args:
        model: a converted model, wrapped or not; of a pipeline, its transformer.
        inputs: see :func:`salad_compile.diagnose`.
        measure: "error", or "recall" for the order that keeps more of the dense softmax mass.

    Raises:
        ConfigError: an unknown measure, or no site has sliding windows. NotConvertedError: nothing is converted.
        InputsError: see :func:`diagnose`. Whatever is raised, the model is unchanged.
    """
    check_choice("measure", measure, MEASURES)
    bare, known = converted_branches(model, "calibrate_heads")
    choosing = {branch.record.owner: branch for branch in known if branch.pattern.head_choice}
    if not choosing:
        raise ConfigError('no site has sliding windows: convert with SaladConfig(pattern="stswa").')
    measured: dict[str, list[Tensor]] = {owner: [] for owner in choosing}

    def look(step: int, call: SiteCall) -> None:
        if call.branch.record.owner in measured:
            measured[call.branch.record.owner].append(_of_both_orders(call, measure))

    run_observed(bare, forward_inputs(bare, inputs), look, "windows")
    sites = []
    for owner, branch in choosing.items():
        spatial, temporal = torch.stack(measured[owner]).mean(dim=0)
        chosen = temporal < spatial if measure == "error" else temporal > spatial
        now = branch.tensors()[str(branch.pattern.head_choice)]
        values = (spatial.tolist(), temporal.tolist(), now.tolist(), chosen.tolist())
        with torch.no_grad():
            now.copy_(chosen)
        sites.append(CalibratedHeads(owner, *map(tuple, values)))
    return HeadCalibration(tuple(sites), measure)


@torch.no_grad()
def _of_both_orders(call: SiteCall, measure: str) -> Tensor:
    """fp64 (2, H): the measure of each head with all windows in space, then with all through time."""
    dense, rows = call.dense(), call.rows()
    name = str(call.branch.pattern.head_choice)
    in_space = torch.zeros_like(call.given.branch[name])
    both = [call.sparse(tensors={name: heads}) for heads in (in_space, ~in_space)]
    if measure == "recall":
        return torch.stack([recall_of(sparse, dense, rows) for sparse in both])
    return torch.stack([distance(sparse.out, dense.out, rows).mse for sparse in both])


# --- the sparsity of each site ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CalibratedSite:
    """One site: the measure at each sparsity that was tried, and the sparsity proposed.

    Attributes:
        pairs: heads times tokens squared, what the site weighs in a mean.
        curve: (sparsity, measure) from the lowest sparsity tried.
        sparsity: proposed. 0.0 where no sparsity that was tried stays within the target: compute everything.
        cost_now, cost: FLOPs of a forward with the site's present sparsity and with the proposed one.
    """

    name: str
    pairs: int
    curve: tuple[tuple[float, float], ...]
    sparsity: float
    cost_now: SiteCost
    cost: SiteCost

    @property
    def within(self) -> bool:
        """Whether a sparsity that was tried stays within the target."""
        return self.sparsity > 0

    @property
    def value(self) -> float | None:
        """The measure at the proposed sparsity, or None where none was within the target."""
        return dict(self.curve).get(self.sparsity)


@dataclass(frozen=True, repr=False)
class Calibration(Report):
    """A proposal of :func:`calibrate`: give `overrides` to a SaladConfig, or :meth:`apply` it to the model."""

    sites: tuple[CalibratedSite, ...]
    measure: Measure
    target: float

    title = "proposed sparsity"
    columns = ("site", "sparsity", "measure", "curve")

    @property
    def overrides(self) -> dict[str, dict[str, Any]]:
        """For `SaladConfig(overrides=...)`: name of each site -> its sparsity."""
        return {site.name: {"sparsity": site.sparsity} for site in self.sites}

    @property
    def sparsity(self) -> float:
        """The mean over sites, weighted by heads and by token pairs (specification 4.5)."""
        return sum(site.pairs * site.sparsity for site in self.sites) / sum(site.pairs for site in self.sites)

    def apply(self, model: Any) -> None:
        """Set the proposed sparsities, without compiling again.

        Raises:
            ConfigError: the model's sparsity is fixed, a proposal lies below its `lowest_sparsity`, or it has other
                sites. Then nothing is set. NotConvertedError: nothing is converted.
        """
        set_sparsity(model, {site.name: site.sparsity for site in self.sites})

    def rows(self) -> list[Row]:
        return [
            (
                site.name or "(model)",
                f"{site.sparsity:g}" if site.within else "0 (none is within)",
                "" if site.value is None else f"{site.value:.4f}",
                ", ".join(f"{sparsity:g}: {value:.3f}" for sparsity, value in site.curve),
            )
            for site in self.sites
        ]

    def notes(self) -> list[str]:
        what = {
            "error": f"relative L1 of the site against dense attention, at most {self.target:g}",
            "recall": f"share of the dense softmax mass that is computed, at least {self.target:g}",
        }[self.measure]
        return [
            f"measure: {what}. Proposed on average, by token pairs: {self.sparsity:.3f}. Each site was measured with "
            "the others as they are: errors that add up along the model are not in the numbers.",
            self._gain(),
        ]

    def _gain(self) -> str:
        dense = sum(site.cost.dense for site in self.sites)
        now = sum(site.cost_now.salad for site in self.sites)
        then = sum(site.cost.salad for site in self.sites)
        return (
            f"Attention per forward, computed: {dense / 1e12:.3f} TFLOP dense, {now / 1e12:.3f} as it is, "
            f"{then / 1e12:.3f} as proposed, {dense / then:.2f} times fewer than dense. That bounds what attention "
            "gains in time; `salad-compile bench` measures it."
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "measure": self.measure,
            "target": self.target,
            "sparsity": self.sparsity,
            "overrides": self.overrides,
            "sites": [dataclasses.asdict(site) for site in self.sites],
        }


def calibrate(
    model: Any,
    inputs: Any,
    *,
    target: float,
    measure: Measure = "error",
    sparsities: Sequence[float] = SPARSITIES,
    config: SaladConfig | Mapping[str, Any] | None = None,
) -> Calibration:
    """Propose a sparsity for each site: the highest that keeps the site within a quality budget on your inputs.

    Nothing is changed. At each site, with the queries, keys and values that reach it, every sparsity is tried in place
    of the site's own. Our choice, as all of calibration: the paper does not speak of it.

    Args:
        model: a converted model, wrapped or not; of a pipeline, its transformer. A model that is not converted is
            copied, and the copy converted: needs memory for two.
        inputs: see :func:`salad_compile.diagnose`.
        target: with "error", the most relative L1 of the site's output (sparse and linear branch, before the output
            projection) against dense attention, above 0. With "recall", the least share of the dense softmax mass that
            the selected blocks hold, in (0, 1]. Over all heads, mean over the inputs.
        measure: "error" or "recall".
        sparsities: what to try, each in (0, 1).
        config: how to convert a model that is not converted.

    Raises:
        ConfigError: a wrong target, measure or sparsity, `config` for a converted model, or a `window` in its
            configuration, which leaves the sparsity nothing to say. InputsError: see :func:`diagnose`.
        What :func:`salad_compile.convert` raises for a model that it cannot convert.
    """
    check_choice("measure", measure, MEASURES)
    tried = _checked(target, measure, sparsities)
    bare = single_model(model, "calibrate")
    given = forward_inputs(bare, inputs)
    bare, known = _converted(bare, given, config)
    if fixed := [branch.record.owner for branch in known if not branch.pattern.follows_sparsity(branch.decoded_spec())]:
        raise ConfigError(
            f"the window of {fixed[0]!r} is fixed at {known[0].config.window} tokens, whatever the sparsity: convert "
            "with window=None to calibrate it."
        )
    measured: dict[str, list[Tensor]] = {branch.record.owner: [] for branch in known}
    run_observed(
        bare,
        given,
        lambda step, call: measured[call.branch.record.owner].append(_curve(call, tried, measure)),
        "sparsities",
    )
    return Calibration(
        tuple(_propose(branch, torch.stack(measured[branch.record.owner]), tried, measure, target) for branch in known),
        measure,
        float(target),
    )


@torch.no_grad()
def _curve(call: SiteCall, sparsities: Sequence[float], measure: str) -> Tensor:
    """fp64 (len(sparsities),): the measure of the whole site at each of them."""
    dense, rows, update = call.dense(), call.rows(), call.update()
    values = []
    for sparsity in sparsities:
        sparse = call.sparse(sparsity)
        if measure == "recall":
            values.append(float(recall_of(sparse, dense, rows).mean()))
        else:
            out = sparse.out if update is None else sparse.out + update.to(sparse.out.dtype)
            values.append(distance(out, dense.out, rows).total_relative_l1)
    return torch.tensor(values, dtype=torch.float64)


def _propose(
    branch: SaladBranch, curves: Tensor, sparsities: Sequence[float], measure: str, target: float
) -> CalibratedSite:
    values = curves.mean(dim=0).tolist()
    within = [
        sparsity
        for sparsity, value in zip(sparsities, values, strict=True)
        if (value <= target if measure == "error" else value >= target)
    ]
    record, proposed = branch.record, max(within, default=0.0)
    return CalibratedSite(
        name=record.owner,
        pairs=record.heads * record.tokens**2,
        curve=tuple(zip(sparsities, values, strict=True)),
        sparsity=proposed,
        cost_now=site_cost(branch),
        cost=site_cost(branch, proposed),
    )


def _converted(bare: nn.Module, given: list[Any], config: Any) -> tuple[nn.Module, list[SaladBranch]]:
    """The model itself, or a converted copy of one that is not converted."""
    if not branches(bare):
        from salad_compile.conversion.convert import convert

        args, kwargs = given[0]
        bare = convert(copy.deepcopy(bare), config, example_inputs=kwargs or args)
    elif config is not None:
        raise ConfigError("config= is for a model that is not converted, and this one is.")
    return converted_branches(bare, "calibrate")


def _checked(target: float, measure: str, sparsities: Sequence[float]) -> tuple[float, ...]:
    number = isinstance(target, (int, float)) and not isinstance(target, bool)
    if not number or not target > 0 or (measure == "recall" and target > 1):
        bounds = "a relative error above 0" if measure == "error" else "a share of softmax mass in (0, 1]"
        raise ConfigError(f"target is {bounds} with measure={measure!r}, got {target!r}.")
    tried = tuple(sorted(sparsities))
    if not tried or not all(isinstance(each, (int, float)) and 0 < each < 1 for each in tried):
        raise ConfigError(f"sparsities are numbers in (0, 1), at least one, got {sparsities!r}.")
    return tuple(map(float, tried))
