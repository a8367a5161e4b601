"""Analytic FLOPs of one attention site, dense and as SALAD (specification 10). A multiply-add counts two."""

from __future__ import annotations

from dataclasses import dataclass

from salad_compile.config import AttentionSpec, density_permille
from salad_compile.kernels import kept_blocks
from salad_compile.sites.branch import SaladBranch


@dataclass(frozen=True)
class SiteCost:
    """FLOPs of one forward of one site: `dense` softmax attention, and everything that SALAD does instead."""

    dense: int
    sparse: int
    routing: int
    linear: int
    projection: int
    lora: int

    @property
    def salad(self) -> int:
        """All of SALAD: sparse attention, routing, linear branch with gate, projection and unmerged LoRA."""
        return self.sparse + self.routing + self.linear + self.projection + self.lora


def site_cost(branch: SaladBranch) -> SiteCost:
    """The cost at the batch size and token count that the conversion saw."""
    record, spec = branch.record, AttentionSpec.decode(branch.spec)
    tokens, batch = record.tokens, record.batch
    key_blocks, query_blocks = -(-tokens // spec.key_block), -(-tokens // spec.query_block)
    permille = density_permille(branch.target_sparsity)
    kept = int(kept_blocks(key_blocks, spec.query_block, spec.key_block, permille))
    keys = min(tokens, kept * spec.key_block)
    qk_width = record.heads * record.head_dim
    per_pair = 2 * (qk_width + record.width)
    gate_weight = branch.tensors().gate_weight
    gate = 0 if gate_weight is None else gate_weight.numel()
    lora = sum(p.numel() for name, p in branch.named_parameters() if name.startswith("lora_"))
    return SiteCost(
        dense=batch * tokens * tokens * per_pair,
        sparse=batch * tokens * keys * per_pair,
        routing=batch * 2 * (tokens * qk_width + query_blocks * key_blocks * qk_width),
        linear=batch * tokens * (4 * record.head_dim * record.width + 2 * gate) if spec.linear_branch else 0,
        projection=batch * 2 * tokens * record.width * record.width if spec.linear_branch else 0,
        lora=batch * 2 * tokens * lora,
    )
