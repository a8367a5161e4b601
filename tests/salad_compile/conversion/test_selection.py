"""`sites=`: names with wildcards, what they leave out, and names that match nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import salad_compile
from salad_compile.backend.dynamo import record_graphs
from salad_compile.errors import ConfigError, NoEligibleSiteError, SiteFilterError
from salad_compile.sites.branch import branches
from tests import toys
from tests.salad_compile.conversion.test_convert import assert_unchanged, fingerprint
from tests.support import randomise_branches, relative_error

CONFIG = salad_compile.SaladConfig(
    compensation="none", sparsity=0.6, query_block=16, key_block=16, lora_rank=2, min_tokens=64
)
INPUTS = (toys.tokens(),)


def stack() -> toys.Stack:
    """layers.0 to layers.11; number 3 is cross-attention."""
    return toys.Stack(*(toys.CrossAttention() if i == 3 else toys.SelfAttention() for i in range(12)))


def chosen(sites: Any) -> list[int]:
    plan = salad_compile.plan(stack(), INPUTS, config=CONFIG, sites=sites)
    return [int(site.name.removeprefix("layers.")) for site in plan.eligible]


@pytest.mark.parametrize("sites", [5, [5], [None], {1: 2}])
def test_what_are_no_names(sites: Any) -> None:
    with pytest.raises(ConfigError, match="sites is a name or a list of names"):
        chosen(sites)


@pytest.mark.parametrize(
    ("sites", "expected"),
    [
        (None, [0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11]),
        ("*", [0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11]),
        ("layers.1", [1]),
        ("layers.1?", [10, 11]),
        (["layers.1", "layers.[789]"], [1, 7, 8, 9]),
        ("!layers.1*", [0, 2, 4, 5, 6, 7, 8, 9]),
        (["!layers.?", "!layers.11"], [10]),
        (("layers.1*", "!layers.11"), [1, 10]),
        (["!layers.11", "layers.1*"], [1, 10]),  # in any order
        (["layers.3", "layers.5"], [5]),  # what cannot be converted is not converted for being named
    ],
)
def test_patterns(sites: Any, expected: list[int]) -> None:
    assert chosen(sites) == expected


def test_what_is_left_out_says_so_and_what_was_dense_keeps_its_reason() -> None:
    plan = salad_compile.plan(stack(), INPUTS, config=CONFIG, sites=["!layers.0", "!layers.3"])
    reasons = {site.name: site.reason for site in plan.sites[""] if not site.eligible}
    assert reasons.keys() == {"layers.0", "layers.3"}
    assert reasons["layers.0"] == "left out by sites=['!layers.0', '!layers.3']"
    assert "cross-attention" in reasons["layers.3"]


@pytest.mark.parametrize("sites", ["layer.1", ["layers.1", "layers.12"], "!Layers.1", [""], "layers"])
def test_a_pattern_that_matches_nothing_is_an_error(sites: Any) -> None:
    model = stack()
    before = fingerprint(model)
    with pytest.raises(SiteFilterError, match=r"matches no attention call.*'layers\.0'") as caught:
        salad_compile.convert(model, CONFIG, example_inputs=INPUTS, sites=sites)
    assert_unchanged(model, before)
    if sites == "layer.1":
        assert "Did you mean 'layers.1'?" in str(caught.value)


@pytest.mark.parametrize("sites", ["!*", "layers.3", ["layers.0", "!layers.0"]])
def test_leaving_out_everything_is_an_error(sites: Any) -> None:
    model = stack()
    before = fingerprint(model)
    with pytest.raises(NoEligibleSiteError, match="left out by sites="):
        salad_compile.convert(model, CONFIG, example_inputs=INPUTS, sites=sites)
    assert_unchanged(model, before)


def test_sites_that_are_left_out_stay_dense_compiled_and_not(tmp_path: Path) -> None:
    model = salad_compile.convert(stack(), CONFIG, example_inputs=INPUTS, sites="layers.[24]")
    assert list(branches(model)) == ["layers.2.salad", "layers.4.salad"]
    randomise_branches(model)
    with record_graphs() as graphs:
        options = {"lowering": "eager", "min_tokens": 1}
        compiled = torch.compile(model, backend="salad", options=options, fullgraph=True)(*INPUTS)
        # alone, nothing but the tag of the conversion says that it must not become block-sparse
        alone = torch.compile(model.layers[0], backend="salad", options=options)(*INPUTS)
    expected = model(*INPUTS)
    assert relative_error(compiled, expected) < 1e-6
    assert relative_error(alone, model.layers[0](*INPUTS)) < 1e-6
    assert (graphs[0].count("salad"), graphs[0].count("dense")) == (2, 10)
    assert [call.status for call in graphs[1].calls] == ["dense"]
    # the file remembers which, and needs no pattern
    loaded = stack()
    loaded.load_state_dict({k: v for k, v in model.state_dict().items() if ".salad." not in k})
    salad_compile.load(loaded, salad_compile.save(model, tmp_path))
    assert list(branches(loaded)) == list(branches(model))
    assert torch.equal(loaded(*INPUTS), expected)
    with record_graphs() as graphs:
        torch._dynamo.reset()
        torch.compile(loaded.layers[0], backend="salad", options=options)(*INPUTS)
    assert [call.reason for call in graphs[0].calls] == ["the conversion left it dense"]
