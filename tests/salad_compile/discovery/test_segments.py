"""Where the text lies: single and dual streams, slices and splits, and reasons for what cannot be told apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import salad_compile
from salad_compile.discovery.attention_site import AttentionSite
from salad_compile.discovery.discover import discover
from salad_compile.discovery.probe import Probe
from tests import toys

VIDEO, TEXT = 84, 20
CLIP = (3, 4, 7)  # VIDEO tokens
Order = Callable[[Tensor, Tensor], list[Tensor]]


def clip() -> Tensor:
    """(B, C, T, H, W): five dimensions make it the video, however many tokens the text has."""
    return toys.tokens(VIDEO).transpose(1, 2).unflatten(2, CLIP)


def flat(video: Tensor) -> Tensor:
    return video.flatten(2).transpose(1, 2)


def sites_of(model: nn.Module, text: int = TEXT, **arguments: Any) -> list[AttentionSite]:
    return discover(model, (clip(), toys.tokens(text)), min_tokens=64, **arguments).sites


def seen(site: AttentionSite) -> tuple[str, str, int, int]:
    assert site.eligible, site.reason
    return site.kind, site.text, site.text_tokens, site.video_tokens


class Streams(nn.Module):
    """`divide` makes (video, text) of what `join` concatenated; both have their projections, and attend jointly."""

    def __init__(
        self,
        order: Order = lambda video, text: [video, text],
        key_order: Order | None = None,
        prepare: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda video, text: (video, text),
    ) -> None:
        super().__init__()
        self.video, self.text = toys.SelfAttention(), toys.SelfAttention()
        self.order, self.key_order, self.prepare = order, key_order or order, prepare

    def forward(self, video: Tensor, text: Tensor) -> Tensor:
        parts, owners = self.prepare(flat(video), text), (self.video, self.text)
        query, key, value = (
            torch.cat(order(*(toys.heads(getattr(m, n)(x)) for m, x in zip(owners, parts, strict=True))), 2)
            for n, order in zip("qkv", (self.order, self.key_order, self.key_order), strict=True)
        )
        return toys.positional(query, key, value).transpose(1, 2).flatten(2)


class Single(toys.SelfAttention):
    """One projection over the concatenation; the projections hang on the model, so its argument counts the text."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.join = join

    def forward(self, video: Tensor, text: Tensor) -> Tensor:
        return super().forward(self.join(flat(video), text))


# --- a single stream -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("join", "text"),
    [
        (lambda video, text: torch.cat([text, video], 1), "before"),
        (lambda video, text: torch.cat([video, text], dim=1), "after"),
        (lambda video, text: torch.concat((text * 2, video.flip(1)), dim=-2), "before"),
        (lambda video, text: torch.cat([video[:, :9], video[:, 9:], text], 1), "after"),
        (lambda video, text: torch.cat([text[:, :5], text[:, 5:], video], 1), "before"),
        (lambda video, text: torch.cat([torch.cat([text, video], 1) * 2], 1), "before"),
    ],
)
def test_text_on_either_side_of_the_video(join: Callable[[Tensor, Tensor], Tensor], text: str) -> None:
    (site,) = sites_of(Single(join))
    assert seen(site) == ("joint", text, TEXT, VIDEO)
    assert site.text_argument == "text"
    record = site.record()
    assert (record.text, record.text_tokens, record.text_query) == (text, TEXT, None)


def test_text_on_both_sides_is_refused() -> None:
    (site,) = sites_of(Single(lambda video, text: torch.cat([text[:, :5], video, text[:, 5:]], 1)))
    assert not site.eligible
    assert site.reason == (
        "its other tokens (text, registers, padding) do not lie on one side of the video: 5 others from 'text', "
        f"{VIDEO} of the video from 'video', {TEXT - 5} others from 'text'"
    )


def test_padding_on_the_other_side_is_told_from_text() -> None:
    (site,) = sites_of(Single(lambda video, text: F.pad(torch.cat([text, video], 1), (0, 0, 0, 6))))
    assert not site.eligible
    assert site.reason.endswith(f"{VIDEO} of the video from 'video', 6 others from none of the inputs")


def test_text_that_only_modulates_the_video_is_no_text() -> None:
    (site,) = sites_of(Single(lambda video, text: video + text.mean(1, keepdim=True)))
    assert seen(site) == ("self", "none", 0, VIDEO)


def test_attention_over_text_alone_has_no_video() -> None:
    (site,) = sites_of(Single(lambda video, text: text), text=70)
    assert (site.eligible, site.reason) == (False, "no video: it reads 'text'")


@pytest.mark.parametrize(("argument", "eligible"), [("x", False), ("text", True)])
def test_a_single_stream_must_know_how_much_is_text(argument: str, eligible: bool) -> None:
    """From an argument of its owner, or from the grid of the video; here neither is there at first."""

    class Owner(toys.SelfAttention):
        def forward(self, x: Tensor, text: Tensor | None = None) -> Tensor:
            return super().forward(x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.owner = Owner()

        def forward(self, video: Tensor, text: Tensor) -> Tensor:
            joined = torch.cat([flat(video), text], 1)
            return self.owner(joined, text) if argument == "text" else self.owner(joined)

    (site,) = sites_of(Model())
    assert (site.eligible, site.text_argument) == (eligible, "text" if eligible else None)
    assert eligible or "pass grid=" in site.reason
    (site,) = sites_of(Model(), grid=CLIP)
    assert (site.eligible, site.on_grid) == (True, True)


def test_an_argument_counts_the_text_only_if_it_is_the_only_one_of_that_length() -> None:
    class Ambiguous(Single):
        def forward(self, video: Tensor, text: Tensor, other: Tensor) -> Tensor:
            return super().forward(video, text + other)

    model = Ambiguous(lambda video, text: torch.cat([video, text], 1))
    (site,) = discover(model, (clip(), toys.tokens(TEXT), toys.tokens(TEXT)), min_tokens=64).sites
    assert (site.eligible, site.text_argument) == (False, None)


# --- slices of a concatenation: the slice is video although the concatenation is not ----------------------------------


def joined(video: Tensor, text: Tensor) -> Tensor:
    return torch.cat([text, video], 1) * 1.5


@pytest.mark.parametrize(
    "divide",
    [
        lambda x: (x[:, :TEXT], x[:, TEXT:]),
        lambda x: (x[:, :-VIDEO], x[:, -VIDEO:]),
        lambda x: (x.narrow(1, 0, TEXT), x.narrow(1, TEXT, VIDEO)),
        lambda x: x.split([TEXT, VIDEO], dim=1),
        lambda x: x.split_with_sizes([TEXT, VIDEO], dim=-2),
        lambda x: x.tensor_split([TEXT], dim=1),
        lambda x: (x[:, 3:][:, : TEXT - 3], x[:, 3:][:, TEXT - 3 :]),
        lambda x: (torch.sigmoid(x)[:, 0:TEXT] * 2, torch.relu(x)[:, TEXT : TEXT + VIDEO] + 1),
    ],
)
def test_streams_are_sliced_from_one_sequence(divide: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    def prepare(video: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        text, video = divide(joined(video, text))
        return video, text

    (site,) = sites_of(Streams(prepare=prepare))
    assert site.kind == "joint"
    assert (site.eligible, site.text) == (True, "after")
    assert site.query == ("video.q", "text.q")


@pytest.mark.parametrize("divide", [lambda x: x.chunk(2, dim=1), lambda x: x.split(VIDEO, dim=1)])
def test_equal_halves(divide: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    def prepare(video: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        text, video = divide(joined(video, text))
        return video, text

    (site,) = sites_of(Streams(prepare=prepare), text=VIDEO)
    assert seen(site) == ("joint", "after", VIDEO, VIDEO)
    assert site.query == ("video.q", "text.q")


def test_a_slice_across_the_border_is_what_it_is_made_of() -> None:
    model = Single(lambda video, text: joined(video, text)[:, TEXT - 5 :])
    (site,) = sites_of(model)
    assert (site.eligible, site.text, site.text_tokens) == (False, "before", 5)
    assert "pass grid=" in site.reason
    (site,) = sites_of(model, grid=CLIP)
    assert (site.eligible, site.text_tokens, site.video_tokens) == (True, 5, VIDEO)


def pad_twice(video: Tensor, text: Tensor) -> Tensor:
    return F.pad(torch.cat([F.pad(text, (0, 0, 0, 3)), video], 1), (0, 0, 2, 0))


def in_a_buffer(video: Tensor, text: Tensor) -> Tensor:
    both = video.new_zeros(video.shape[0], TEXT + VIDEO, video.shape[2])
    both[:, :TEXT] = text
    both[:, TEXT:] = video
    return both


def in_views_of_a_buffer(video: Tensor, text: Tensor) -> Tensor:
    both = torch.empty(video.shape[0], TEXT + VIDEO, video.shape[2])
    for part, tokens in zip(both.split([TEXT, VIDEO], 1), (text, video), strict=True):
        part.copy_(tokens)
    return both


def by_index(video: Tensor, text: Tensor) -> Tensor:
    both = video.new_zeros(video.shape[0], TEXT + VIDEO, video.shape[2])
    return both.index_copy(1, torch.arange(TEXT), text).slice_scatter(video, 1, TEXT)


def by_pages(video: Tensor, text: Tensor) -> Tensor:
    """As many pages of as many tokens as there is text."""
    assert VIDEO % 12 == 0
    return torch.stack([*text[:, :12].split(12, 1), *video.split(12, 1)], 1).flatten(1, 2)


def with_registers(video: Tensor, text: Tensor) -> Tensor:
    registers = torch.nn.Parameter(torch.randn(1, 4, video.shape[2])).expand(video.shape[0], -1, -1)
    return torch.cat([torch.cat([registers, text], 1), video], 1)


def without_gradients(video: Tensor, text: Tensor) -> Tensor:
    with torch.no_grad():
        text = text[:, :-3].clone()
    return torch.concatenate([text, video], axis=1)


JOINS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], int]] = {
    "hstack": (lambda video, text: torch.hstack((text, video)), TEXT),
    "vstack": (lambda video, text: torch.vstack((text.transpose(0, 1), video.transpose(0, 1))).transpose(0, 1), TEXT),
    "padded": (pad_twice, TEXT + 5),
    "buffer": (in_a_buffer, TEXT),
    "views of a buffer": (in_views_of_a_buffer, TEXT),
    "index": (by_index, TEXT),
    "pages": (by_pages, 12),
    "registers": (with_registers, TEXT + 4),
    "without gradients": (without_gradients, TEXT - 3),
}


@pytest.mark.parametrize("name", JOINS)
def test_text_stays_text_however_it_is_joined(name: str) -> None:
    join, text = JOINS[name]
    (site,) = sites_of(Single(join), grid=CLIP)
    assert seen(site) == ("joint", "before", text, VIDEO)


def kernel(x: Tensor) -> Tensor:
    """What no mode sees, as the kernels of other projects."""
    # private: hides what runs from modes. Seen in torch 2.13; were it to show it, the next test would fail
    with torch._C.DisableTorchFunction():
        return x.flip(1)


def kernel_with_memory(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    with torch._C.DisableTorchFunction():
        out.copy_(x)
    return out


UNSEEN = "an operation that torch does not show"


@pytest.mark.parametrize(
    ("mix", "reason"),
    [
        (lambda x: x.sort(1).values, "sort is not known to keep tokens where they are"),
        (lambda x: x[:, torch.randperm(x.shape[1])], "an index is known at run time only"),
        (kernel, UNSEEN),
        (kernel_with_memory, UNSEEN),
    ],
)
def test_tokens_of_which_nobody_knows_are_not_taken_for_video(mix: Callable[[Tensor], Tensor], reason: str) -> None:
    (site,) = sites_of(Single(lambda video, text: mix(torch.cat([text, video], 1))), grid=CLIP)
    assert (site.eligible, site.reason) == (False, f"which of its tokens are text is not known: {reason}")


def test_an_operation_over_the_video_alone_may_be_unknown() -> None:
    (site,) = sites_of(Single(lambda video, text: video.sort(1).values))
    assert seen(site) == ("self", "none", 0, VIDEO)


@pytest.mark.parametrize("join", [torch.hstack, lambda parts: in_a_buffer(parts[1], parts[0])])
def test_two_streams_however_they_are_joined(join: Callable[[list[Tensor]], Tensor]) -> None:
    class Joined(Streams):
        def forward(self, video: Tensor, text: Tensor) -> Tensor:
            query, key, value = (
                toys.heads(join([getattr(self.text, name)(text), getattr(self.video, name)(flat(video))]))
                for name in "qkv"
            )
            return toys.positional(query, key, value).transpose(1, 2).flatten(2)

    (site,) = sites_of(Joined())
    assert seen(site) == ("joint", "before", TEXT, VIDEO)
    assert site.query == ("video.q", "text.q")


# --- two streams -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("order", "text"), [(lambda video, text: [video, text], "after"), (lambda video, text: [text, video], "before")]
)
def test_two_streams_in_both_orders(order: Order, text: str) -> None:
    (site,) = sites_of(Streams(order))
    assert seen(site) == ("joint", text, TEXT, VIDEO)
    record = site.record()
    assert (record.query, record.key, record.value) == ("video.q", "video.k", "video.v")
    assert (record.text_query, record.text_key, record.text_value) == ("text.q", "text.k", "text.v")


def test_the_second_block_still_knows_which_stream_is_text() -> None:
    """By then both streams have seen each other: what passed through attention does not count."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Streams(), Streams()

        def forward(self, video: Tensor, text: Tensor) -> Tensor:
            x = flat(video)
            for block in (self.first, self.second):
                out = block(x.transpose(1, 2).unflatten(2, CLIP), text)
                x, text = x + out[:, :VIDEO], text + out[:, VIDEO:]
            return x

    sites = sites_of(Two())
    assert [(site.name, *seen(site)) for site in sites] == [
        (name, "joint", "after", TEXT, VIDEO) for name in ("first", "second")
    ]


def test_keys_in_another_order_than_queries_are_refused() -> None:
    (site,) = sites_of(Streams(lambda video, text: [video, text], lambda video, text: [text, video]))
    assert (site.eligible, site.reason) == (False, "query, key and value concatenate their streams differently")


@pytest.mark.parametrize(
    "prepare",
    [
        lambda video, text: (video, video * 2),
        lambda video, text: (torch.cat([text, text], 1), text),
        lambda video, text: (video, text + video.mean(1, keepdim=True)),
    ],
)
def test_two_streams_of_which_not_just_one_is_video(
    prepare: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> None:
    (site,) = sites_of(Streams(prepare=prepare), text=40)
    assert (site.kind, site.eligible) == ("joint", False)
    assert site.reason == "joint attention over two streams, of which not just one is video"


def test_two_projections_that_are_added_are_no_two_streams() -> None:
    class Added(Streams):
        def forward(self, video: Tensor, text: Tensor) -> Tensor:
            x = flat(video)
            operands = (toys.heads(getattr(self.video, n)(x) + getattr(self.text, n)(x)) for n in "qkv")
            return toys.positional(*operands)

    (site,) = sites_of(Added())
    assert not site.eligible
    assert site.reason == "two projections make its query, key or value, but not one for each part of the tokens"


def test_three_streams_are_refused() -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(toys.SelfAttention() for _ in range(3))

        def forward(self, video: Tensor, text: Tensor) -> Tensor:
            streams = (flat(video), text, text * 2)
            operands = (
                torch.cat([toys.heads(getattr(m, n)(x)) for m, x in zip(self.parts, streams, strict=True)], 2)
                for n in "qkv"
            )
            return toys.positional(*operands)

    (site,) = sites_of(Three())
    assert (site.eligible, site.reason) == (False, "query, key or value are made by several projections")


def test_the_report_says_how_much_is_text() -> None:
    plan = salad_compile.plan(
        Single(lambda video, text: torch.cat([text, video], 1)),
        (clip(), toys.tokens(TEXT)),
        config=salad_compile.SaladConfig(compensation="none", min_tokens=64),
    )
    assert plan.rows()[0][1:3] == ("joint", f"{TEXT} text + {VIDEO}")


# --- where tokens come from -------------------------------------------------------------------------------------------

LENGTHS = (5, 8, 13)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_what_a_value_reads_is_what_its_gradient_reaches(data: st.DataObject) -> None:
    """Random programs of slices, splits, concatenations and pointwise operations, against autograd itself."""
    probe = Probe()
    with probe:
        leaves = [torch.ones(1, length, 2, requires_grad=True) for length in LENGTHS]
        values = [leaf.clone() for leaf in leaves]
        probe.labels.start({f"input {i}": [value] for i, value in enumerate(values)})
        for _ in range(data.draw(st.integers(1, 8))):
            first = data.draw(st.sampled_from(values))
            what = data.draw(st.sampled_from(["cat", "slice", "split", "scale"]))
            length = first.shape[1]
            if what == "cat":
                rest = data.draw(st.lists(st.sampled_from(values), min_size=1, max_size=2))
                values.append(torch.cat([first, *rest], dim=data.draw(st.sampled_from([1, -2]))))
            elif what == "scale":
                values.append((first * 2).sin())
            elif length > 1:
                at = data.draw(st.integers(1, length - 1))
                pair = first.split([at, length - at], dim=1) if what == "split" else (first[:, :at], first[:, at:])
                values.append(pair[data.draw(st.integers(0, 1))])
        last = values[-1]
    gradients = torch.autograd.grad(last.sum(), leaves, allow_unused=True)
    reached = {f"input {i}" for i, g in enumerate(gradients) if g is not None and bool(g.any())}
    assert probe.labels.names_of(probe.labels.of_tokens(last)) == reached
