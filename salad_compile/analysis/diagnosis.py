"""diagnose(model, inputs): how much of dense attention each site and head keeps, and what its linear branch adds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from salad_compile.analysis.forwards import converted_branches, forward_inputs, run_observed
from salad_compile.analysis.site_call import Dense, SiteCall, Sparse
from salad_compile.common.checks import check_choice
from salad_compile.common.reports import Report, Row, plural

Detail: TypeAlias = Literal["site", "head", "step"]
DETAILS: tuple[Detail, ...] = get_args(Detail)


class Distance(NamedTuple):
    """How far an attention output is from dense attention, for each head: fp64 (H,) each.

    Attributes:
        l1: sum |O - O_dense|, and reference: sum |O_dense|.
        cosine: of the two, each as one vector of all tokens and channels.
        mse: sum (O - O_dense)^2 over sum O_dense^2.
    """

    l1: Tensor
    reference: Tensor
    cosine: Tensor
    mse: Tensor

    @property
    def relative_l1(self) -> Tensor:
        """(H,), sum |O - O_dense| / sum |O_dense|."""
        return ratio(self.l1, self.reference)

    @property
    def total_relative_l1(self) -> float:
        """The same over all heads."""
        return float(ratio(self.l1.sum(), self.reference.sum()))


def ratio(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, and 0 where both are 0."""
    return torch.where(part == 0, torch.zeros_like(part), part / whole)


def distance(out: Tensor, reference: Tensor, rows: Tensor) -> Distance:
    """Compare two attention outputs head by head, so that no fp64 copy of all heads is ever made.

    Relative L1 and cosine as the literature on sparse attention reports them (SpargeAttn); our choice.

    Args:
        out, reference: (B, H, S, D) of one dtype. rows: bool (B, S), the tokens to compare over.
    """
    sums = []
    for head in range(out.shape[1]):
        one, other = (tensor[:, head][rows].double() for tensor in (out, reference))
        difference, norms = one - other, one.norm() * other.norm()
        cosine = ratio((one * other).sum(), norms)
        mse = ratio(difference.square().sum(), other.square().sum())
        sums.append(torch.stack((difference.abs().sum(), other.abs().sum(), cosine, mse)))
    return Distance(*torch.stack(sums, dim=1).cpu())


def head_means(values: Tensor, rows: Tensor) -> Tensor:
    """(B, H, S) -> fp64 (H,): the mean over the tokens `rows`, bool (B, S)."""
    return values.transpose(0, 1)[:, rows].double().mean(dim=1).cpu()


def recall_of(sparse: Sparse, dense: Dense, rows: Tensor) -> Tensor:
    """fp64 (H,): the share of the dense softmax mass that the computed blocks hold, as a mean over query tokens.

    Of one query it is sum over selected keys of exp(s) over the sum over all keys: exp(lse_sparse - lse_dense).
    """
    return head_means((sparse.lse - dense.lse).exp(), rows)


def norms(out: Tensor, rows: Tensor) -> Tensor:
    """fp64 (H,): the Frobenius norm of each head, over the tokens `rows`."""
    return torch.stack([out[:, head][rows].double().norm() for head in range(out.shape[1])]).cpu()


def contribution_of(update: Tensor | None, sparse: Sparse, rows: Tensor) -> tuple[Tensor, float]:
    """||G Proj(O_l)||_F / ||O_s||_F of each head, fp64 (H,), and of all heads (rho, specification 7)."""
    below = norms(sparse.out, rows)
    above = torch.zeros_like(below) if update is None else norms(update, rows)
    return ratio(above, below), float(ratio(above.norm(), below.norm()))


@dataclass(frozen=True)
class HeadDiagnosis:
    """One head of one site in one forward, over the video's tokens.

    Attributes:
        recall: share of the dense softmax mass in the blocks that are computed, in [0, 1].
        sparse_l1, salad_l1: relative L1 against dense attention, of the sparse branch alone and with the linear one.
        sparse_cosine, salad_cosine: cosine with dense attention.
        gate: mean of the gate, or None without one.
        contribution: norm of what the linear branch adds over the norm of the sparse branch.
    """

    recall: float
    sparse_l1: float
    salad_l1: float
    sparse_cosine: float
    salad_cosine: float
    gate: float | None
    contribution: float


@dataclass(frozen=True)
class SiteDiagnosis:
    """One site in one forward. step: the number of the inputs. contribution: rho_l over all heads (specification 7)."""

    name: str
    step: int
    contribution: float
    heads: tuple[HeadDiagnosis, ...]

    def mean(self, field: str) -> float | None:
        """The mean over heads of a field of :class:`HeadDiagnosis`; None where a head has none."""
        values = [getattr(head, field) for head in self.heads]
        return None if None in values else sum(values) / len(values)


@torch.no_grad()
def diagnose_call(call: SiteCall, step: int) -> SiteDiagnosis:
    """Everything about one attention call."""
    dense, sparse, update, gate, rows = call.dense(), call.sparse(), call.update(), call.gate(), call.rows()
    alone = distance(sparse.out, dense.out, rows)
    whole = alone if update is None else distance(sparse.out + update.to(sparse.out.dtype), dense.out, rows)
    recall = recall_of(sparse, dense, rows)
    shares, rho = contribution_of(update, sparse, rows)
    heads = call.given.query.shape[1]
    gates: list[Any] = [None] * heads
    if gate is not None:
        by_head = gate.transpose(1, 2).expand(-1, heads, -1)
        gates = head_means(by_head, rows[:, call.video]).tolist()
    columns = {
        "recall": recall,
        "sparse_l1": alone.relative_l1,
        "salad_l1": whole.relative_l1,
        "sparse_cosine": alone.cosine,
        "salad_cosine": whole.cosine,
        "contribution": shares,
    }
    return SiteDiagnosis(
        name=call.branch.record.owner,
        step=step,
        contribution=rho,
        heads=tuple(
            HeadDiagnosis(gate=gates[head], **{name: float(column[head]) for name, column in columns.items()})
            for head in range(heads)
        ),
    )


@dataclass(frozen=True, repr=False)
class Diagnosis(Report):
    """What :func:`diagnose` measured. `calls` holds everything; `detail` says what the table shows."""

    calls: tuple[SiteDiagnosis, ...]
    detail: Detail = "site"

    title = "attention against dense"
    columns = (
        "site",
        "head",
        "step",
        "recall",
        "lowest",
        "L1 sparse",
        "L1 SALAD",
        "cosine sparse",
        "cosine SALAD",
        "gate",
        "contribution",
    )

    def by(self, detail: Detail) -> Diagnosis:
        """The same with another table: a row for each "site", for each "head" of it, or for each "step" of it."""
        check_choice("the detail of a diagnosis", detail, DETAILS)
        return dataclasses.replace(self, detail=detail)

    @property
    def sites(self) -> dict[str, list[SiteDiagnosis]]:
        """Name of a site -> its calls, in the order of the inputs."""
        found: dict[str, list[SiteDiagnosis]] = {}
        for call in self.calls:
            found.setdefault(call.name, []).append(call)
        return found

    def rows(self) -> list[Row]:
        rows: list[Row] = []
        for name, calls in self.sites.items():
            heads = range(len(calls[0].heads))
            if self.detail == "site":
                rows.append(_row(name, "all", "all", calls, heads))
            elif self.detail == "head":
                rows += [_row(name, str(head), "all", calls, range(head, head + 1)) for head in heads]
            else:
                rows += [_row(name, "all", str(call.step), [call], heads) for call in calls]
        return rows

    def notes(self) -> list[str]:
        steps = len({call.step for call in self.calls})
        return [
            f"{plural(len(self.sites), 'site')}, {plural(steps, 'forward')}; means over heads and forwards, over "
            "the video's tokens. recall: share of the dense softmax mass that is computed (lowest: of a head). "
            "L1, cosine: against dense attention of the same queries, keys and values; L1 is the sum of absolute "
            "differences over that of dense, of the sparse branch alone and of SALAD, with the linear one. Fine-tuning "
            "aims at the video and not at this: SALAD's may be the larger. contribution: norm of what the linear "
            "branch adds over that of the sparse one.",
        ]

    def to_dict(self) -> dict[str, Any]:
        return {"calls": [dataclasses.asdict(call) for call in self.calls]}


def _row(name: str, head: str, step: str, calls: Sequence[SiteDiagnosis], heads: range) -> Row:
    chosen = [call.heads[i] for call in calls for i in heads]
    lowest = min(sum(call.heads[i].recall for call in calls) / len(calls) for i in heads)
    whole = len(heads) == len(calls[0].heads)
    shares = [call.contribution for call in calls] if whole else [each.contribution for each in chosen]
    gates = [each.gate for each in chosen if each.gate is not None]
    fields = ("sparse_l1", "salad_l1", "sparse_cosine", "salad_cosine")
    return (
        name or "(model)",
        head,
        step,
        _mean([each.recall for each in chosen]),
        f"{lowest:.3f}",
        *(_mean([getattr(each, field) for each in chosen]) for field in fields),
        _mean(gates) if gates else "none",
        _mean(shares),
    )


def _mean(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.3f}"


def diagnose(model: Any, inputs: Any) -> Diagnosis:
    """Measure a converted model's attention against dense attention on your inputs; nothing is changed.

    At each site queries, keys and values are those that reach it in the model as it is, so that errors of earlier sites
    do not count. The model runs uncompiled and in eval mode, once for each of the inputs; two runs give the same.

    Args:
        model: a converted model, wrapped or not; of a pipeline, its transformer.
        inputs: a dict of keyword inputs or a tuple of positional ones of the model's forward, or a list of several: the
            denoising steps of a video, say.

    Raises:
        NotConvertedError: nothing is converted. ConfigError: a pipeline.
        InputsError: the inputs are none, do not fit, or make the forward fail.
    """
    bare, _ = converted_branches(model, "diagnose")
    calls: list[SiteDiagnosis] = []
    run_observed(
        bare,
        forward_inputs(bare, inputs),
        lambda step, call: calls.append(diagnose_call(call, step)),
        "diagnosis",
    )
    return Diagnosis(tuple(calls))
