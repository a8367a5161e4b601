"""The faults that tools/plant_faults.py plants: one wrong line each, over all rooms.

`edits` are (found, planted) pairs that name the same fault in differently written code, tried in order: the first whose
text occurs in the product is planted, at its first occurrence. `tests` are the files that should notice, most likely
first; patterns that match no file are passed over.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One fault. interpreted: its tests run Triton's interpreter."""

    name: str
    room: str
    edits: tuple[tuple[str, str], ...]
    tests: tuple[str, ...]
    interpreted: bool = False


def _fault(name: str, room: str, *edits: tuple[str, str], tests: str, interpreted: bool = False) -> Fault:
    return Fault(name, room, edits, tuple(tests.split()), interpreted)


SPARSE = "tests/kernels/block_sparse/*.py"
ROUTING = "tests/kernels/routing/*.py"
LINEAR = "tests/kernels/linear/*.py"
DEFINITION = "tests/salad_compile/**/test_attention.py tests/salad_compile/**/test_grouped_queries.py"

FAULTS = (
    # ------------------------------------------------------------------------------------------------ kernels, torch
    _fault(
        "scores scaled by 2 % too much",
        "kernels/block_sparse",
        ("beta=0, alpha=scale, out=scores)", "beta=0, alpha=scale * 1.02, out=scores)"),
        tests=SPARSE,
    ),
    _fault(
        "the last token of a short block is hidden",
        "kernels/block_sparse",
        (
            "visible.masked_fill_(ids == plan.key_blocks - 1, plan.short)",
            "visible.masked_fill_(ids == plan.key_blocks - 1, plan.short - 1)",
        ),
        tests=SPARSE,
    ),
    _fault(
        "key mask dropped",
        "kernels/block_sparse",
        ("hidden |= ~self._valid[self._ids[rows]]", "hidden |= False"),
        tests=SPARSE,
    ),
    _fault(
        "dense rows run sparse",
        "kernels/block_sparse",
        ("any_dense = bool((count == ALL_BLOCKS).any())", "any_dense = False"),
        ("any_dense = bool((selection.count == ALL_BLOCKS).any())", "any_dense = False"),
        tests=SPARSE,
    ),
    _fault(
        "key gradient lost",
        "kernels/block_sparse",
        ("_accumulate(grad_key, index, gathered)", "pass"),
        tests=SPARSE,
    ),
    _fault(
        "delta with the wrong sign in the backward",
        "kernels/block_sparse",
        ("gathered.transpose(1, 2), beta=-1, out=grad_scores)", "gathered.transpose(1, 2), beta=1, out=grad_scores)"),
        tests=SPARSE,
    ),
    _fault(
        "log-sum-exp with the wrong sign",
        "kernels/block_sparse",
        ("lse.sub_(largest.log_())", "lse.add_(largest.log_())"),
        tests=SPARSE,
    ),
    _fault(
        "the mean of a short block divides by a full one",
        "kernels/routing",
        ("pooled.div_(seen[:, None, :, None])", "pooled.div_(block)"),
        ("pooled[:, :, full].div_(tokens - full * block)", "pooled[:, :, full].div_(block)"),
        ("(block, 1), ceil_mode=True)", "(block, 1), ceil_mode=True, divisor_override=block)"),
        tests=ROUTING,
    ),
    _fault(
        "a query block may miss its own keys",
        "kernels/routing",
        ('scores.masked_fill_(overlap, float("inf"))', "scores.masked_fill_(overlap, 0.0)"),
        ('query_block, key_block, scores.device), float("inf"))', "query_block, key_block, scores.device), 0.0)"),
        tests=ROUTING,
    ),
    _fault(
        "pools count the blocks that are selected",
        "kernels/tail",
        ("left = ~block_mask(lut, count,", "left = block_mask(lut, count,"),
        tests="tests/kernels/tail/test_tail.py",
    ),
    _fault(
        "the gradient of pools forgets delta",
        "kernels/tail",
        (".sub_(delta).mul_(weights)", ".mul_(weights)"),
        tests="tests/kernels/tail/test_tail.py",
    ),
    _fault(
        "text is in pools",
        "kernels/tail",
        ("((position >= begin) & (position < end))[None]", "(position >= 0)[None]"),
        tests="tests/kernels/tail/test_means.py tests/salad_compile/**/test_compensation.py",
    ),
    _fault(
        "the first block of text is no sink",
        "kernels/routing",
        ('scores[..., first:end] = float("inf")', 'scores[..., first + 1 : end] = float("inf")'),
        tests=ROUTING,
    ),
    _fault(
        "one block too many kept",
        "kernels/routing",
        ("key_blocks * density_permille // 1000", "(key_blocks * density_permille + 999) // 1000"),
        tests=ROUTING,
    ),
    _fault(
        "a cell with few keys counts as a full one",
        "kernels/mass",
        ("torch.baddbmm(added, queries[:, rows], keys)", "torch.bmm(queries[:, rows], keys)"),
        tests="tests/kernels/mass/test_mass.py",
    ),
    _fault(
        "a block's error is that of its values alone",
        "kernels/mass",
        ("queries.square() @ _variance(key, block, mask).mT", "queries.square().sum(3, keepdim=True)"),
        tests="tests/kernels/mass/test_mass.py",
    ),
    _fault(
        "a window ends one block early",
        "kernels/windows",
        ("(distance <= reach)", "(distance < reach)"),
        tests="tests/kernels/windows/*.py",
    ),
    _fault(
        "elu without its + 1",
        "kernels/linear",
        ("F.elu(x) + 1", "F.elu(x)"),
        tests=LINEAR,
    ),
    _fault(
        "the normaliser's gradient with the wrong sign",
        "kernels/linear",
        (".div_(denominator).neg_()", ".div_(denominator)"),
        tests=LINEAR,
    ),
    _fault(
        "masked keys enter the linear state",
        "kernels/linear",
        ("features = _keep(phi(key[b, :, run].to(dtype)), masked)", "features = phi(key[b, :, run].to(dtype))"),
        tests=LINEAR,
    ),
    _fault(
        "rows moved the same way back in the backward",
        "kernels/rows",
        ("ctx.saved_tensors", "ctx.saved_tensors[::-1]"),
        tests="tests/kernels/rows/*.py tests/kernels/test_operators.py",
    ),
    # ----------------------------------------------------------------------------------------------- kernels, Triton
    _fault(
        "Triton: one key too many at the ragged end",
        "kernels/block_sparse",
        ("visible = start + columns < tokens", "visible = start + columns <= tokens"),
        tests="tests/kernels/gpu/test_block_sparse.py",
        interpreted=True,
    ),
    _fault(
        "Triton: NaN outranks numbers",
        "kernels/routing",
        ("tl.where(bits > _INFINITY, _NAN,", "tl.where(bits > _INFINITY, bits,"),
        tests="tests/kernels/gpu/test_routing.py",
        interpreted=True,
    ),
    _fault(
        "Triton: a cell with few keys counts as a full one",
        "kernels/mass",
        ("factor[None, :] + held[:, None] - lse", "factor[None, :] - lse"),
        tests="tests/kernels/gpu/test_mass.py",
        interpreted=True,
    ),
    _fault(
        "Triton: a query cell with few tokens counts as a full one",
        "kernels/mass",
        ("largest + tl.log2(total) - held", "largest + tl.log2(total)"),
        tests="tests/kernels/gpu/test_mass.py",
        interpreted=True,
    ),
    _fault(
        "Triton: lse not converted from base 2",
        "kernels/block_sparse",
        ("(highest + tl.log2(total)) * _LN2", "(highest + tl.log2(total))"),
        tests="tests/kernels/gpu/test_block_sparse.py",
        interpreted=True,
    ),
    # ------------------------------------------------------------------------------------------------- the definition
    _fault(
        "what processes have in common of a head is not added up",
        "kernels/exchange",
        ("whole[first:last] += received", "whole[first:last] = received"),
        tests="tests/trainers/test_split_heads.py",
    ),
    _fault(
        "processes attend with each other's blocks of a head",
        "kernels/exchange",
        ("own = torch.zeros_like(x)", "own = x.clone()"),
        tests="tests/trainers/test_split_heads.py",
    ),
    _fault(
        "each process takes the weights of the first heads",
        "definition",
        ("first = first_head(spec.process_group, heads)", "first = 0 * heads"),
        tests="tests/trainers/test_context_parallel.py",
    ),
    _fault(
        "gate inverted",
        "definition",
        ("torch.sigmoid(logits.to(", "torch.sigmoid(-logits.to("),
        ("torch.sigmoid(cast(logits,", "torch.sigmoid(-cast(logits,"),
        tests=DEFINITION,
    ),
    _fault(
        "static scale of the heads ignored",
        "definition",
        ("linear * branch.head_scale.to(linear.dtype).unsqueeze(-1)", "linear"),
        ('linear * branch["head_scale"].to(linear.dtype).unsqueeze(-1) if _has_scales(spec) else linear', "linear"),
        (
            'linear * cast(branch["head_scale"], linear.dtype).unsqueeze(-1) if _has_scales(spec) else linear',
            "linear",
        ),
        tests=DEFINITION,
    ),
    _fault(
        "the update lands on the wrong rows of a joint sequence",
        "definition",
        ("(0, 0, where.video_begin, tokens - where.video_end)", "(0, 0, tokens - where.video_end, where.video_begin)"),
        (
            "(0, 0, where.video_begin, given.tokens - where.video_end)",
            "(0, 0, given.tokens - where.video_end, where.video_begin)",
        ),
        tests=DEFINITION + " tests/salad_compile/**/test_masks.py tests/models/test_zoo.py",
    ),
    _fault(
        "tokens are not moved back",
        "definition",
        ("take_rows.default(out, moved.inverse, moved.order)", "take_rows.default(out, moved.order, moved.inverse)"),
        ("order, back = reversed(self.moved) if inverse else self.moved", "order, back = self.moved"),
        tests=DEFINITION + " tests/salad_compile/**/test_video_grid.py",
    ),
    _fault(
        "query heads meet the wrong key head",
        "definition",
        ("tensor.repeat_interleave(groups, dim=1)", "tensor.repeat(1, groups, 1, 1)"),
        ("tensor.repeat_interleave(heads_per_key, dim=1)", "tensor.repeat(1, heads_per_key, 1, 1)"),
        tests=DEFINITION,
    ),
    _fault(
        "windows: heads in space and in time exchanged",
        "definition",
        ("chosen = temporal_heads[:, None, None]", "chosen = ~temporal_heads[:, None, None]"),
        ("Arrangement(moved, heads[:, None, None]", "Arrangement(moved, ~heads[:, None, None]"),
        tests=DEFINITION,
    ),
    _fault(
        "the linear branch sees rotated features where it should not",
        "definition",
        ("key, rotated_key = mapped.key, mapped.rotated_key", "rotated_key, key = mapped.key, mapped.rotated_key"),
        tests=DEFINITION,
    ),
    # --------------------------------------------------------------------------------------------------------- grid
    _fault(
        "text in front takes the video's places",
        "grid",
        ("begin = 0 if text_first else order.shape[0]", "begin = order.shape[0] if text_first else 0"),
        tests="tests/salad_compile/grid/*.py tests/salad_compile/test_geometry.py",
    ),
    _fault(
        "order of the previous video kept",
        "grid",
        (
            "self.order = cached_order(tile_order, grid, device)",
            "self.order = cached_order(tile_order, grid, device) if self.order is None else self.order",
        ),
        ("self.orders = {name: cached_order", "self.orders = self.orders or {name: cached_order"),
        (
            "order = cached_order(tile_order, grid, device)",
            "order = self.__dict__.setdefault('_kept', cached_order(tile_order, grid, device))",
        ),
        (
            "return {name: cached_order(make, grid, device) for name, make in self.makers.items()}",
            "return self.__dict__.setdefault('_kept', {n: cached_order(m, grid, device) for n, m in "
            "self.makers.items()})",
        ),
        tests="tests/salad_compile/**/test_video_grid.py",
    ),
    _fault(
        "incomplete patches at the border forgotten",
        "grid",
        ("(shape[axis] + patch - 1) // patch", "shape[axis] // patch"),
        ("((size + edge - 1) // edge for size, edge", "(size // edge for size, edge"),
        tests="tests/salad_compile/grid/*.py tests/salad_compile/test_geometry.py",
    ),
    # --------------------------------------------------------------------------------------------- sites and position
    _fault(
        "low-rank update without its scale",
        "sites",
        ("F.linear(F.linear(x, down), up) * scale", "F.linear(F.linear(x, down), up) * scale.sign()"),
        tests="tests/salad_compile/**/test_merge.py tests/salad_compile/**/test_calls.py tests/passes/test_rewrite.py "
        "tests/salad_compile/exchange/*.py",
    ),
    _fault(
        "a site may run dense without a word",
        "sites",
        ("        if not self.replaced:\n", "        if False:\n"),
        tests="tests/salad_compile/**/test_calls.py tests/salad_compile/sites/*.py tests/models/test_zoo.py",
    ),
    _fault(
        "the wrong attention call of a module is replaced",
        "sites",
        ("self.branch.record.call_index + self.replaced", "self.replaced"),
        ("record.call_index + self.replaced", "self.replaced"),
        tests="tests/salad_compile/**/test_calls.py tests/salad_compile/sites/*.py tests/models/test_zoo.py "
        "tests/salad_compile/**/test_convert.py tests/salad_compile/**/test_conversion.py",
    ),
    _fault(
        "dense stays switched on",
        "sites",
        ("            switch.turn(was)\n", "            pass\n"),
        tests="tests/salad_compile/**/test_schedules.py tests/salad_compile/sites/*.py",
    ),
    _fault(
        "prepared operands turn by the sine where the cosine belongs",
        "position",
        ("(other[first], -1), (other[second], 1)", "(own[first], -1), (other[second], 1)"),
        tests="tests/passes/test_prepare_operands.py",
    ),
    _fault(
        "prepared operands pair halves as neighbours",
        "position",
        ("return pairs, np.flatnonzero(turned & is_first)", 'return "interleaved", np.flatnonzero(turned & is_first)'),
        tests="tests/passes/test_prepare_operands.py",
    ),
    _fault(
        "a block keeps for its backward pass what is cheap",
        "passes",
        ('node.meta["ac_graph_id"] = _BEFORE_EVERY_REGION', 'del node.meta["recompute"]'),
        tests="tests/passes/test_spare_memory.py",
    ),
    _fault(
        "position replay leaves out the key's features",
        "position",
        ("scalings = {node for node in made if is_scaling(node, operation(node)[0])}", "scalings = set()"),
        tests="tests/passes/test_replay_position.py tests/models/test_position.py",
    ),
    # -------------------------------------------------------------------------------------------- passes and discovery
    _fault(
        "a lost site is not reported",
        "passes",
        ("        if tag not in used:", "        if False:"),
        tests="tests/passes/*.py",
    ),
    _fault(
        "key mask dropped in the graph",
        "passes",
        ("query.shape[0]) if kind else None", "query.shape[0]) if False else None"),
        tests="tests/salad_compile/**/test_masks.py tests/passes/*.py",
    ),
    _fault(
        "every sample gets the gate of the first",
        "passes",
        ("rows[call.sample : call.sample + 1]", "rows[0:1]"),
        tests="tests/salad_compile/sites/test_calls.py tests/salad_compile/test_calls.py tests/models/test_zoo.py",
    ),
    _fault(
        "short sequences are taken",
        "passes",
        ("enough = bool(queries >= min_tokens)", "enough = True"),
        tests="tests/passes/*.py",
    ),
    # ------------------------------------------------------------------------------------------------------ conversion
    _fault(
        "base parameters stay trainable",
        "conversion",
        ("            parameter.requires_grad_(False)\n", "            pass\n"),
        tests="tests/salad_compile/conversion/test_convert.py tests/salad_compile/test_conversion.py",
    ),
    _fault(
        "merge forgets alpha / rank",
        "conversion",
        ("(up @ down) * branch.low_rank_scale", "(up @ down) * branch.low_rank_scale.sign()"),
        ("(up @ down) * parameters.low_rank_scale", "(up @ down) * parameters.low_rank_scale.sign()"),
        tests="tests/salad_compile/**/test_merge.py",
    ),
    # ------------------------------------------------------------------------- salad_files, exchange, latents, training
    _fault(
        "a file of another base is taken",
        "salad_files",
        ("return hashlib.sha256(json.dumps(parts).encode()).hexdigest()", "return hashlib.sha256(b'').hexdigest()"),
        tests="tests/salad_compile/**/test_checkpoint.py tests/salad_compile/salad_files/*.py",
    ),
    _fault(
        "exported LoRA without its scale",
        "exchange",
        ("self.up.float() * self.scale\n", "self.up.float()\n"),
        tests="tests/salad_compile/exchange/*.py",
    ),
    _fault(
        "latents shifted the wrong way",
        "latents",
        ("((latent.double() - mean) / std)", "((latent.double() + mean) / std)"),
        tests="tests/salad_compile/latents/*.py",
    ),
    _fault(
        "velocity with the wrong sign",
        "training",
        ("TIMESTEPS * s, noise - clean", "TIMESTEPS * s, clean - noise"),
        tests="tests/salad_compile/training/*.py",
    ),
    _fault(
        "all samples of a step get the same noise",
        "training",
        ('generator(settings.seed, "step", step, place)', 'generator(settings.seed, "step", step)'),
        tests="tests/salad_compile/training/*.py",
    ),
    _fault(
        "an expert is trained on noise of the other",
        "training",
        ("u = first + (last - first) * (point", "u = (point"),
        ("return first + (last - first) * float(", "return float("),
        tests="tests/salad_compile/training/*.py",
    ),
    # -------------------------------------------------------------------------------------------------------- analysis
    _fault(
        "recall above one",
        "analysis",
        ("(sparse.lse - dense.lse).exp()", "(dense.lse - sparse.lse).exp()"),
        tests="tests/salad_compile/**/test_diagnosis.py",
    ),
    _fault(
        "cost counts half of the products",
        "conversion",
        ("per_pair = 2 * (qk_width", "per_pair = 1 * (qk_width"),
        ("2 * (qk_width + record.width)", "(qk_width + record.width)"),
        ("2 * (size.query_width + record.width)", "(size.query_width + record.width)"),
        tests="tests/salad_compile/**/test_inspection.py tests/salad_compile/conversion/*.py",
    ),
)
