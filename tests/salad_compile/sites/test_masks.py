"""Attention masks: key padding is obeyed, whatever its form; everything else keeps a call dense, and says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import salad_compile
from salad_compile.calls.adapters import dense_reason, key_padding, mask_kind
from salad_compile.discovery.attention_site import AttentionSite
from salad_compile.discovery.discover import discover
from salad_compile.errors import SiteLostError
from tests import toys
from tests.support import assert_same, check_rewrite, randomise_branches, relative_error, run

CONFIG = salad_compile.SaladConfig(
    compensation="none", sparsity=0.6, query_block=16, key_block=16, lora_rank=2, min_tokens=64
)
DENSE_CONFIG = salad_compile.SaladConfig(
    compensation="none", sparsity=0.0, query_block=16, key_block=16, lora_rank=2, min_tokens=64
)
TOKENS = 90
MakeMask = Callable[[Tensor], Tensor]


class Masked(toys.SelfAttention):
    """`make` turns the valid tokens (B, S) into a mask of the attention."""

    def __init__(self, make: MakeMask, *, read: bool = False) -> None:
        super().__init__()
        self.make, self.read = make, read

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        if self.read and int(valid.sum()) == 0:  # then discovery looks at real tensors
            raise ValueError("nothing is valid")
        q, k, v = (toys.heads(projection(x)) for projection in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.make(valid))
        result: Tensor = self.o(out.transpose(1, 2).flatten(2))
        return result


def keys(valid: Tensor) -> Tensor:
    return valid[:, None, None, :]


def square(valid: Tensor) -> Tensor:
    """What HunyuanVideo makes of a padding mask: padded queries see nothing."""
    return valid[:, None, :, None] & valid[:, None, None, :]


def rows_of_keys(valid: Tensor) -> Tensor:
    return valid[:, None, None, :].expand(-1, -1, valid.shape[1], -1)


def padded(batch: int = 2) -> dict[str, Tensor]:
    """Of the first sample everything is valid but 23 tokens at the end, of the second all but 7 in the middle."""
    valid = torch.ones(batch, TOKENS, dtype=torch.bool)
    valid[0, -23:] = False
    valid[1:, 40:47] = False
    return {"x": toys.tokens(TOKENS, batch), "valid": valid}


def converted(make: MakeMask, config: salad_compile.SaladConfig = CONFIG, **arguments: Any) -> Masked:
    torch.manual_seed(1)
    model: Masked = salad_compile.convert(Masked(make, **arguments), config, example_inputs=padded())
    return model


def site_of(make: MakeMask, **arguments: Any) -> AttentionSite:
    (site,) = discover(Masked(make, **arguments), padded(), min_tokens=64).sites
    return site


FORMS = [(keys, False), (square, True), (rows_of_keys, True)]
every_form = pytest.mark.parametrize(("make", "read"), FORMS, ids=["keys", "square", "rows"])


@every_form
def test_padding_is_recognised(make: MakeMask, read: bool) -> None:
    site = site_of(make, read=read)
    assert (site.eligible, site.mask_kind) == (True, "padding" if read else "keys"), site.reason
    assert site.record().square_mask == read


@every_form
def test_sparsity_zero_equals_dense_on_valid_rows(make: MakeMask, read: bool) -> None:
    torch.manual_seed(1)
    dense, inputs = Masked(make), padded()
    model = converted(make, DENSE_CONFIG, read=read)
    out, valid = model(**inputs), inputs["valid"]
    assert relative_error(out[valid], dense(**inputs)[valid]) < 1e-6
    assert out.isfinite().all(), "rows that nobody reads must not become NaN: they reach gradients"
    unmasked = dense(inputs["x"], torch.ones_like(valid))
    assert relative_error(unmasked[valid], dense(**inputs)[valid]) > 1e-2, "the mask hides nothing: a vacuous test"


@every_form
def test_what_is_padded_does_not_matter(make: MakeMask, read: bool) -> None:
    """Neither to the sparse branch nor to the selection of blocks; zeros stand for padding in the linear branch too."""
    model, inputs = converted(make, read=read), padded()
    valid = inputs["valid"]
    expected = model(**inputs)
    garbage = torch.where(valid[..., None], inputs["x"], 1e4 * torch.randn_like(inputs["x"]))
    assert relative_error(model(garbage, valid)[valid], expected[valid]) < 1e-5
    randomise_branches(model)
    expected = model(**inputs)
    assert relative_error(model(garbage, valid)[valid], expected[valid]) < 1e-5


@every_form
def test_padding_equals_a_shorter_video(make: MakeMask, read: bool) -> None:
    """Padding at the end of a sequence changes nothing but the number of blocks to choose from."""
    model = converted(make, DENSE_CONFIG, read=read)
    randomise_branches(model)
    x, valid = toys.tokens(TOKENS), torch.ones(2, TOKENS, dtype=torch.bool)
    valid[:, 80:] = False
    short = model(x[:, :80], torch.ones(2, 80, dtype=torch.bool))
    assert relative_error(model(x, valid)[:, :80], short) < 1e-5


@every_form
def test_compiled_equals_eager(make: MakeMask, read: bool) -> None:
    model, inputs = converted(make, read=read), padded()
    randomise_branches(model)
    model.read = False  # a value that is read breaks the graph
    recorder = check_rewrite(model, inputs, sites=1)
    assert recorder.after["salad.linear_state"] == 1
    # the mask is an input of the graph, not a constant
    compiled = torch.compile(model, backend="salad", options={"lowering": "aot_eager"})
    for length in (90, 70, 33):
        valid = torch.arange(TOKENS).expand(2, -1) < length
        out = compiled(inputs["x"], valid)
        assert relative_error(out, model(inputs["x"], valid)) < 1e-6


def test_one_mask_for_the_whole_batch() -> None:
    model = converted(lambda valid: keys(valid)[:1])
    randomise_branches(model)
    inputs = padded()
    check_rewrite(model, inputs, sites=1, lowering="aot_eager")
    both = {"x": inputs["x"], "valid": inputs["valid"][:1].expand(2, -1)}
    torch.manual_seed(1)
    each = converted(keys)
    randomise_branches(each)
    assert_same(run(model, inputs), run(each, both))


def test_a_sample_without_padding_equals_no_mask() -> None:
    model = converted(keys)
    randomise_branches(model)
    inputs = padded()
    free = toys.SelfAttention()
    salad_compile.convert(free, CONFIG, example_inputs=(inputs["x"],))
    free.load_state_dict(model.state_dict())
    out = model(inputs["x"], torch.ones_like(inputs["valid"]))
    assert relative_error(out, free(inputs["x"])) < 1e-6


# --- what stays dense ------------------------------------------------------------------------------------------------


def block_causal(valid: Tensor) -> Tensor:
    frame = torch.arange(valid.shape[1]) // 30
    return (frame[:, None] >= frame[None, :]).expand(valid.shape[0], 1, -1, -1)


PER_QUERY = "its attention mask differs from query to query"
NO_PADDING = "its attention mask is no key-padding mask: not bool, or not the same for all heads, or of one key"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (block_causal, PER_QUERY),
        (lambda valid: torch.ones(valid.shape[1], valid.shape[1], dtype=torch.bool).tril()[None, None], PER_QUERY),
        (lambda valid: keys(valid).float(), NO_PADDING),
        (lambda valid: torch.zeros(valid.shape[0], 1, 1, valid.shape[1]), NO_PADDING),
        (lambda valid: keys(valid).expand(-1, 2, -1, -1), NO_PADDING),
        (lambda valid: valid[0, None, :].expand(valid.shape[1], -1), NO_PADDING),
    ],
)
@pytest.mark.parametrize("read", [False, True])
def test_other_masks_stay_dense_with_a_reason(make: MakeMask, reason: str, read: bool) -> None:
    site = site_of(make, read=read)
    unread = ", as far as fake tensors show" if reason == PER_QUERY and not read else ""
    assert (site.eligible, site.reason) == (False, reason + unread)


def test_causal_stays_dense() -> None:
    (site,) = discover(toys.SelfAttention(toys.causal), (toys.tokens(),), min_tokens=64).sites
    assert (site.eligible, site.reason, site.causal) == (False, "it is causal", True)


def test_a_square_mask_that_stops_being_padding_is_trusted_to_be_one() -> None:
    """Its values are not read again: key padding is what conversion saw. What changes its shape is an error."""
    model = converted(square, read=True)
    model.make = lambda valid: keys(valid).float().log()
    with pytest.raises(SiteLostError, match="no key-padding mask"):
        model(**padded())


# --- the rules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "dtype", "kind"),
    [
        ((2, 1, 1, 9), torch.bool, "keys"),
        ((1, 1, 1, 9), torch.bool, "keys"),
        ((2, 1, 9, 9), torch.bool, "square"),
        ((1, 1, 9, 9), torch.bool, "square"),
        ((2, 3, 1, 9), torch.bool, "other"),
        ((9, 9), torch.bool, "other"),
        ((2, 9, 9), torch.bool, "other"),
        ((2, 1, 1, 9), torch.float32, "other"),
    ],
)
def test_kinds_of_masks(shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> None:
    assert mask_kind(torch.ones(shape, dtype=dtype)) == kind


def test_no_mask() -> None:
    assert mask_kind(None) == ""
    assert dense_reason(_call(), [(2, 4, 9, 8)] * 3, "") == ""


def test_valid_keys_of_a_mask() -> None:
    valid = padded()["valid"]
    for make, kind in ((keys, "keys"), (square, "square"), (rows_of_keys, "square")):
        assert torch.equal(key_padding(make(valid), kind, 2), valid)
    assert torch.equal(key_padding(keys(valid[:1]), "keys", 2), valid[:1].expand(2, -1))


def _call() -> Any:
    from salad_compile.calls.adapters import AttentionArguments

    return AttentionArguments(None, None, None)
