"""Analytic FLOPs of one attention site, dense and as SALAD (specification 10). A multiply-add counts two."""

from __future__ import annotations

from dataclasses import dataclass

from salad_compile.definition.pattern import CallSize
from salad_compile.definition.spec import AttentionSpec, density_permille
from salad_compile.kernels.layout import block_count
from salad_compile.sites.branch import SaladBranch


@dataclass(frozen=True)
class SiteCost:
    """FLOPs of one forward of one site: `dense` softmax attention, and everything that SALAD does instead;
    `sparse` includes pools."""

    dense: int
    sparse: int
    routing: int
    linear: int
    projection: int
    lora: int
    attended: float = 1.0
    """Share of the pairs of a query and a key that sparse attention computes."""

    @property
    def salad(self) -> int:
        """All of SALAD: sparse attention, routing, linear branch with gate, projection and unmerged LoRA."""
        return self.sparse + self.routing + self.linear + self.projection + self.lora


def site_cost(branch: SaladBranch, sparsity: float | None = None) -> SiteCost:
    """The cost at the batch size and token count that the conversion saw; at the site's own sparsity without one."""
    record, spec, pattern = branch.record, branch.decoded_spec(), branch.pattern
    video = record.tokens if record.text == "prefix" else record.tokens - record.text_tokens
    size = CallSize(record.batch, record.tokens, video, record.heads * record.head_dim)
    pairs = pattern.computed_pairs(
        size, spec, density_permille(branch.target_sparsity if sparsity is None else sparsity)
    )
    per_pair = 2 * (size.query_width + record.width)
    elements = {"linear": 0, "projection": 0, "lora": 0}
    for row in branch.rows():
        if row.cost is not None:
            elements[row.cost] += getattr(branch, row.name).numel()
    if spec.linear_branch:  # K^T V, and Q times it
        elements["linear"] += 2 * record.head_dim * record.width
    return SiteCost(
        dense=size.batch * size.tokens * size.tokens * per_pair,
        sparse=size.batch * (pairs + _pool_pairs(size, spec)) * per_pair,
        routing=pattern.selection_flops(size, spec),
        attended=pairs / size.tokens**2,
        **{name: 2 * size.batch * size.tokens * count for name, count in elements.items()},
    )


def _pool_pairs(size: CallSize, spec: AttentionSpec) -> int:
    """Pairs of a query and a pool."""
    return 0 if spec.compensation == "none" else size.tokens * block_count(size.tokens, spec.pool)
