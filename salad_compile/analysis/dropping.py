"""drop_branches(model, inputs): remove the linear branches that contribute least (specification 7)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from salad_compile.analysis.diagnosis import contribution_of
from salad_compile.analysis.forwards import converted_branches, forward_inputs, run_observed
from salad_compile.analysis.site_call import SiteCall
from salad_compile.common.reports import Report, Row
from salad_compile.common.wrappers import unwrap
from salad_compile.errors import ConfigError, WrappedModelError
from salad_compile.sites.branch import SaladBranch

# "about 20 %" of the branches can go with little loss, as summaries of arXiv 2601.16515 say (specification 7).
FRACTION = 0.2


@dataclass(frozen=True)
class RankedSite:
    """A site with its rho_l, and whether its linear branch was dropped."""

    name: str
    contribution: float
    dropped: bool


@dataclass(frozen=True, repr=False)
class DroppingReport(Report):
    """What :func:`drop_branches` measured and did; the sites in the order of the model."""

    sites: tuple[RankedSite, ...]
    parameters: int
    variants: int

    title = "linear branches"
    columns = ("site", "contribution", "linear branch")

    @property
    def dropped(self) -> list[str]:
        """Names of the sites whose branch was dropped, the least contribution first."""
        return [site.name for site in sorted(self.sites, key=lambda site: site.contribution) if site.dropped]

    def rows(self) -> list[Row]:
        return [
            (site.name or "(model)", f"{site.contribution:.4f}", "dropped" if site.dropped else "kept")
            for site in self.sites
        ]

    def notes(self) -> list[str]:
        return [
            f"{len(self.dropped)} of {len(self.sites)} linear branches dropped, {self.parameters:,} parameters. "
            "contribution: norm of what the branch adds over that of the sparse one, mean over the inputs.",
            "Compiled block by block, blocks with and without a linear branch are two variants: two compilations."
            if self.variants > 1
            else "All sites compile to one variant of their block, as before.",
        ]

    def to_dict(self) -> dict[str, Any]:
        return {
            "sites": [dataclasses.asdict(site) for site in self.sites],
            "parameters": self.parameters,
            "variants": self.variants,
        }


def drop_branches(model: Any, inputs: Any, *, fraction: float = FRACTION) -> DroppingReport:
    """Drop the linear branches that contribute least, in place, after fine-tuning.

    Of the L sites that have a linear branch, the floor(fraction * L) with the lowest rho_l = mean over inputs of
    ||G Proj(O_l)||_F / ||O_s||_F lose gate and projection (specification 7, our criterion). Their sparse branch and
    their low-rank updates stay. `save` remembers which. A compiled model compiles again on its next call. An optimizer
    made before still holds the parameters that are gone: make a new one if you train on.

    Args:
        model: a converted model, compiled or not, but not distributed; of a pipeline, its transformer.
        inputs: see :func:`salad_compile.diagnose`.
        fraction: in [0, 1). At least one branch always stays: a tuned model without any loses detail and coherence.

    Raises:
        ConfigError: a wrong fraction, no site has a linear branch, or a pipeline. NotConvertedError: nothing is
            converted. WrappedModelError: the parameters are distributed. InputsError: see :func:`diagnose`.
        Whatever is raised, the model is unchanged.
    """
    _check_fraction(fraction)
    bare, known = converted_branches(model, "drop_branches")
    candidates = [branch for branch in known if branch.decoded_spec().linear_branch]
    if not candidates:
        raise ConfigError("no site of this model has a linear branch: there is nothing to drop.")
    _require_local(model, candidates)
    measured: dict[str, list[float]] = {branch.record.owner: [] for branch in candidates}

    def measure(step: int, call: SiteCall) -> None:
        if call.branch.record.owner in measured:
            share = contribution_of(call.update(), call.sparse(), call.rows())
            measured[call.branch.record.owner].append(share[1])

    run_observed(bare, forward_inputs(bare, inputs), measure, "contributions")
    rho = {owner: sum(shares) / len(shares) for owner, shares in measured.items()}
    leaving = sorted(candidates, key=lambda branch: rho[branch.record.owner])[: share_of(fraction, len(candidates))]
    parameters = sum(p.numel() for branch in leaving for p in branch.linear_parameters().values())
    for branch in leaving:
        branch.drop_linear()
    return DroppingReport(
        tuple(RankedSite(b.record.owner, rho[b.record.owner], b in leaving) for b in candidates),
        parameters,
        len({branch.decoded_spec().linear_branch for branch in known}),
    )


def share_of(fraction: float, count: int) -> int:
    """floor(fraction * count), without the traps of floating point: 0.29 * 100 is 28.999999999999996."""
    return math.floor(fraction * count + 1e-9)


def _check_fraction(fraction: float) -> None:
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 <= fraction <= 1:
        raise ConfigError(f"fraction is the share of linear branches to drop, a number in [0, 1), got {fraction!r}.")
    if fraction == 1:
        raise ConfigError(
            "fraction=1.0 would drop every linear branch, which costs a tuned model detail and coherence: choose less, "
            "0.2 say. A model without linear branches is convert(model, SaladConfig(linear_branch=False)), fine-tuned."
        )


def _require_local(model: Any, candidates: list[SaladBranch]) -> None:
    from torch.distributed.tensor import DTensor

    while type(model).__name__ == "OptimizedModule":
        model = model._orig_mod
    if unwrap(model) is not model or any(isinstance(p, DTensor) for branch in candidates for p in branch.parameters()):
        raise WrappedModelError(
            "the model is distributed, and its wrapper counts on parameters that would go: drop branches first, then "
            "wrap it (or save, load into a base model, and drop there)."
        )
