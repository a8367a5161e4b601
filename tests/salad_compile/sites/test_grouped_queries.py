"""Key and value heads that several query heads share, and keys that no query belongs to."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import salad_compile
from salad_compile.calls.adapters import AttentionArguments, dense_reason
from salad_compile.definition.spec import AttentionSpec
from salad_compile.discovery.attention_site import AttentionSite
from salad_compile.discovery.discover import discover
from salad_compile.errors import SiteLostError
from salad_compile.sites.branch import branches
from tests import toys
from tests.support import check_rewrite, randomise_branches, relative_error

CONFIG = salad_compile.SaladConfig(
    compensation="none", sparsity=0.6, query_block=16, key_block=16, lora_rank=2, lora_alpha=6.0, min_tokens=64
)
DENSE_CONFIG = salad_compile.SaladConfig(
    compensation="none", sparsity=0.0, query_block=16, key_block=16, lora_rank=2, min_tokens=64
)
WIDTH, HEADS, KEY_HEADS, HEAD_DIM = 16, 6, 2, 8
Share = Callable[[Tensor], Tensor]


def repeat_interleave(x: Tensor) -> Tensor:
    return x.repeat_interleave(HEADS // KEY_HEADS, dim=1)


def expand(x: Tensor) -> Tensor:
    """As transformers' repeat_kv."""
    batch, heads, tokens, width = x.shape
    return x[:, :, None].expand(batch, heads, HEADS // KEY_HEADS, tokens, width).reshape(batch, HEADS, tokens, width)


def split_heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)


class Grouped(nn.Module):
    """6 query heads and 2 key heads; `share` repeats those before the call, None leaves it to enable_gqa."""

    def __init__(self, share: Share | None = None) -> None:
        super().__init__()
        self.share = share
        self.q = nn.Linear(WIDTH, HEADS * HEAD_DIM)
        self.k, self.v = (nn.Linear(WIDTH, KEY_HEADS * HEAD_DIM) for _ in range(2))
        self.o = nn.Linear(HEADS * HEAD_DIM, WIDTH)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q(x), self.k(x), self.v(x)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(part) for part in self.project(x))
        if self.share is None:
            out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        else:
            out = F.scaled_dot_product_attention(q, self.share(k), self.share(v))
        result: Tensor = self.o(out.transpose(1, 2).flatten(2))
        return result


class Fused(Grouped):
    """One projection of 6 + 2 + 2 heads."""

    def __init__(self, share: Share | None = None) -> None:
        super().__init__(share)
        del self.q, self.k, self.v
        self.qkv = nn.Linear(WIDTH, (HEADS + 2 * KEY_HEADS) * HEAD_DIM)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).split([n * HEAD_DIM for n in (HEADS, KEY_HEADS, KEY_HEADS)], dim=-1)
        return q, k, v


class FusedKeys(Grouped):
    """A query projection, and one of both keys and values."""

    def __init__(self, share: Share | None = None) -> None:
        super().__init__(share)
        del self.k, self.v
        self.kv = nn.Linear(WIDTH, 2 * KEY_HEADS * HEAD_DIM)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        k, v = self.kv(x).chunk(2, dim=-1)
        return self.q(x), k, v


every_kind = pytest.mark.parametrize("kind", [Grouped, Fused, FusedKeys])
every_share = pytest.mark.parametrize("share", [None, repeat_interleave, expand], ids=["gqa", "repeat", "expand"])


def build(kind: type[Grouped], share: Share | None) -> Grouped:
    torch.manual_seed(1)
    return kind(share)


def converted(
    kind: type[Grouped], share: Share | None, config: salad_compile.SaladConfig = CONFIG, *, randomise: bool = True
) -> Grouped:
    model: Grouped = salad_compile.convert(build(kind, share), config, example_inputs=(toys.tokens(),))
    if randomise:
        randomise_branches(model)
    return model


def site_of(model: nn.Module, *inputs: Tensor) -> AttentionSite:
    (site,) = discover(model, inputs, min_tokens=64).sites
    return site


@every_kind
@every_share
def test_sites(kind: type[Grouped], share: Share | None) -> None:
    site = site_of(kind(share), toys.tokens())
    assert (site.kind, site.eligible, site.reason) == ("self", True, "")
    assert (site.heads, site.key_heads) == (HEADS, KEY_HEADS if share is None else HEADS)
    record = site.record()
    assert record.groups == (3 if share is None else 1)
    assert record.width == HEADS * HEAD_DIM


@every_kind
@every_share
def test_sparsity_zero_equals_dense(kind: type[Grouped], share: Share | None) -> None:
    model = converted(kind, share, DENSE_CONFIG, randomise=False)
    assert relative_error(model(toys.tokens()), build(kind, share)(toys.tokens())) < 1e-6


@every_kind
def test_how_heads_are_shared_does_not_matter(kind: type[Grouped]) -> None:
    outputs = [converted(kind, share)(toys.tokens()) for share in (None, repeat_interleave, expand)]
    assert relative_error(outputs[1], outputs[0]) < 1e-6
    assert relative_error(outputs[2], outputs[0]) < 1e-6


@every_kind
@every_share
def test_compiled_equals_eager(kind: type[Grouped], share: Share | None) -> None:
    check_rewrite(converted(kind, share), {"x": toys.tokens()}, sites=1)


@every_kind
@every_share
def test_lora_equals_changed_weights(kind: type[Grouped], share: Share | None) -> None:
    """Each role's update meets its own share of a fused projection, and those shares have different widths."""
    model = converted(kind, share)
    expected = model(toys.tokens())
    (branch,) = branches(model).values()
    assert branch.low_rank_query_up.shape == (HEADS * HEAD_DIM, 2)
    assert branch.low_rank_key_up.shape == branch.low_rank_value_up.shape == (KEY_HEADS * HEAD_DIM, 2)
    with torch.no_grad():
        for first, slots in branch.slots.items():
            weight = model.get_submodule(branch.record.projections()[first]).weight
            for part, (role, _) in zip(weight.split([rows for _, rows in slots]), slots, strict=True):
                up, down = getattr(branch, f"low_rank_{role}_up"), getattr(branch, f"low_rank_{role}_down")
                part += 3.0 * up @ down
                up.zero_()
    assert relative_error(model(toys.tokens()), expected) < 1e-5


@every_kind
@every_share
def test_merging_lora(kind: type[Grouped], share: Share | None) -> None:
    model = converted(kind, share)
    expected = model(toys.tokens())
    salad_compile.merge_lora(model)
    assert relative_error(model(toys.tokens()), expected) < 1e-5


def test_training_free_compilation_of_grouped_queries() -> None:
    options = {"sparsity": 0.6, "query_block": 16, "key_block": 16, "min_tokens": 64, "lowering": "eager"}
    options["compensation"] = "none"  # as a conversion has it
    sparse = [
        torch.compile(build(Grouped, share), backend="salad", options=options)(toys.tokens())
        for share in (None, repeat_interleave)
    ]
    fresh = converted(Grouped, None, randomise=False)(toys.tokens())
    assert relative_error(sparse[0], fresh) < 1e-6
    assert relative_error(sparse[1], fresh) < 1e-6


def test_one_key_head_for_all_without_saying_so() -> None:
    """scaled_dot_product_attention broadcasts a single head without enable_gqa."""

    class Broadcast(Grouped):
        def __init__(self, share: Share | None = None) -> None:
            super().__init__(share)
            self.k, self.v = (nn.Linear(WIDTH, HEAD_DIM) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            out = F.scaled_dot_product_attention(*(split_heads(part) for part in self.project(x)))
            result: Tensor = self.o(out.transpose(1, 2).flatten(2))
            return result

    assert site_of(Broadcast(), toys.tokens()).record().groups == 6
    model = converted(Broadcast, None, DENSE_CONFIG, randomise=False)
    assert relative_error(model(toys.tokens()), build(Broadcast, None)(toys.tokens())) < 1e-6
    check_rewrite(converted(Broadcast, None), {"x": toys.tokens()}, sites=1, lowering="aot_eager")


@pytest.mark.parametrize(
    ("heads", "even"), [((6, 2, 2), True), ((6, 1, 1), True), ((6, 4, 4), False), ((6, 2, 1), False)]
)
def test_heads_that_cannot_be_shared_evenly_stay_dense(heads: tuple[int, int, int], even: bool) -> None:
    shapes = [(2, count, 70, HEAD_DIM) for count in heads]
    reason = dense_reason(AttentionArguments(None, None, None), shapes, "")
    assert reason == ("" if even else f"6 query heads do not share {heads[1]} key and {heads[2]} value heads evenly")


# --- a prefix of keys ------------------------------------------------------------------------------------------------


class Prefixed(toys.SelfAttention):
    """Keys and values of a context come before those of the video; the context asks nothing (specification 4.4)."""

    first = True

    def __init__(self) -> None:
        super().__init__()
        self.context_k, self.context_v = (nn.Linear(toys.WIDTH, toys.WIDTH) for _ in range(2))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        def join(*parts: Tensor) -> Tensor:
            return torch.cat(parts if self.first else parts[::-1], 1)

        k = join(self.context_k(context), self.k(x))
        v = join(self.context_v(context), self.v(x))
        out = toys.positional(*(toys.heads(part) for part in (self.q(x), k, v)))
        result: Tensor = self.o(out.transpose(1, 2).flatten(2))
        return result


def prefixed(config: salad_compile.SaladConfig = CONFIG) -> Prefixed:
    torch.manual_seed(2)
    model: Prefixed = salad_compile.convert(Prefixed(), config, example_inputs=(toys.tokens(), toys.tokens(13)))
    return model


def test_a_prefix_is_found() -> None:
    site = site_of(Prefixed(), toys.tokens(), toys.tokens(13))
    assert (site.kind, site.eligible, site.reason) == ("mixed", True, "")
    assert (site.text, site.text_tokens, site.query_tokens, site.key_tokens) == ("prefix", 13, 70, 83)
    record = site.record()
    assert (record.query, record.key, record.value) == ("q", "k", "v")  # those of the video get the updates
    assert AttentionSpec.decode(prefixed().salad.spec).text == "prefix"


def test_a_prefix_at_sparsity_zero_equals_dense() -> None:
    torch.manual_seed(2)
    dense = Prefixed()
    model = prefixed(DENSE_CONFIG)
    for context in (13, 1, 40):
        inputs = (toys.tokens(), toys.tokens(context))
        assert relative_error(model(*inputs), dense(*inputs)) < 1e-6


def test_a_prefix_is_always_attended_to() -> None:
    """At a sparsity at which one of five blocks is left, the context still reaches every query of every head."""
    model = prefixed()
    x, context = toys.tokens(), toys.tokens(13).requires_grad_()
    out = model.q(x).detach() * 0 + model(x, context)
    for token in range(0, 70, 9):
        (gradient,) = torch.autograd.grad(out[0, token].sum(), context, retain_graph=True)
        assert (gradient[0].abs().sum(-1) > 0).all()


def test_a_compiled_prefix_equals_eager() -> None:
    model = prefixed()
    randomise_branches(model)
    check_rewrite(model, {"x": toys.tokens(), "context": toys.tokens(13)}, sites=1, lowering="aot_eager")


def test_keys_behind_the_videos_stay_dense() -> None:
    class Suffixed(Prefixed):
        first = False

    site = site_of(Suffixed(), toys.tokens(), toys.tokens(13))
    assert (site.eligible, site.reason) == (False, "key and value come from other tokens than the query")


def test_more_queries_than_keys_are_an_error() -> None:
    class Cutting(toys.SelfAttention):
        cut = 0

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (toys.heads(projection(x)) for projection in (self.q, self.k, self.v))
            out = toys.positional(q, k[:, :, self.cut :], v[:, :, self.cut :])
            result: Tensor = self.o(out.transpose(1, 2).flatten(2))
            return result

    model = salad_compile.convert(Cutting(), CONFIG, example_inputs=(toys.tokens(),))
    model.cut = 5
    with pytest.raises(SiteLostError, match="70 queries meet 65 keys"):
        model(toys.tokens())
    with pytest.raises(Exception, match=r"70|65"):
        torch.compile(model, backend="salad", options={"lowering": "eager"})(toys.tokens())
