"""Every video DiT class of the installed diffusers has a case in the zoo, or a reason to have none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.attention.flex_attention as flex
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.registry import ALL_CASES, WITHOUT_CASE, cases_of, transformers, video_classes
from tests.models.zoo import CASES, Case
from tests.models.zoo_handwritten import HANDWRITTEN_CASES
from tests.models.zoo_joint import JOINT_CASES
from tests.models.zoo_special import SPECIAL_CASES

NEW = {**JOINT_CASES, **SPECIAL_CASES}
every_new_case = pytest.mark.parametrize("case", NEW.values(), ids=NEW.keys())

# Between the most tokens of text or audio in any case and the fewest of video.
SHORT = 100


def test_the_rules_find_the_families() -> None:
    """Each rule by a class that only it finds, and no image model with them."""
    found = video_classes()
    assert found["LatteTransformer3DModel"] == "its name"
    assert found["TransformerTemporalModel"] == "its documentation"
    assert found["Cosmos3OmniTransformer"].startswith("used by pipelines/cosmos/")
    assert len(found) >= 30, sorted(found)
    assert not {"FluxTransformer2DModel", "SD3Transformer2DModel", "QwenImageTransformer2DModel"} & set(found)


def test_every_video_class_has_a_case_or_a_reason() -> None:
    """One test for all classes: to find them takes seconds, which collecting the tests need not spend."""
    faults = []
    for name, rule in sorted(video_classes().items()):
        cases, reason = cases_of(name), WITHOUT_CASE.get(name)
        if not (cases or reason):
            faults.append(
                f"{name} is a video DiT (by {rule}) without a case: add one to tests/models/zoo*.py, or a reason to "
                "WITHOUT_CASE in tests/models/registry.py"
            )
        if cases and reason:
            faults.append(f"{name} has the cases {cases}: drop its reason {reason!r}")
    assert not faults, "\n".join(faults)


def test_nothing_is_listed_that_is_not_there() -> None:
    assert set(WITHOUT_CASE) <= set(video_classes()), "a reason for a class that diffusers does not have"
    assert {name for name in transformers() if cases_of(name)} <= set(video_classes()), "a case that no rule finds"


def test_cases_have_names_of_their_own() -> None:
    assert len(ALL_CASES) == sum(map(len, (CASES, HANDWRITTEN_CASES, JOINT_CASES, SPECIAL_CASES)))
    assert all(name == case.name for name, case in ALL_CASES.items())


@every_new_case
def test_a_new_case_is_built_as_it_says(case: Case) -> None:
    model = case.build()
    assert not any(module.training for module in model.modules())
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32, name
        assert parameter.any(), f"{name} is left at zero"
    modules = dict(model.named_modules())
    assert {*case.sites, *case.repeated_blocks} <= set(modules)
    for name in (*case.projections.values(), *case.text_projections.values()):
        assert isinstance(modules[name], nn.Linear), name
    again = case.build()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@every_new_case
@pytest.mark.parametrize("resolution", [0, 1])
def test_a_new_case_attends_where_it_says(case: Case, resolution: int) -> None:
    model = case.build()
    state = torch.random.get_rng_state()
    inputs = case.inputs(resolution)
    with _attention(model) as calls, torch.no_grad():
        output = case.output(model(**inputs))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert output.isfinite().all()
    assert output.std() > 0.1

    at_sites = [call for call in calls if call.inside(case.sites) and call.queries > SHORT]
    assert [call.inside(case.sites) for call in at_sites] == [site for site in case.sites for _ in range(case.calls)]
    elsewhere = [call for call in calls if not call.inside(case.sites)]
    assert all(call.queries < SHORT or call.queries != call.keys for call in elsewhere), "self-attention not listed"
    for call in at_sites:
        assert (call.keys > call.queries) == (case.kind == "mixed")
    if at_sites:
        assert at_sites[0].mask == case.mask


class _Call:
    """One attention call: how many queries and keys, the kind of mask, and the modules that were running."""

    def __init__(self, query: Tensor, key: Tensor, mask: Any, running: list[str]) -> None:
        self.queries, self.keys = query.shape[-2], key.shape[-2]
        self.mask = self._kind(mask)
        self.running = tuple(running)

    def _kind(self, mask: Any) -> str:
        if mask is None:
            return ""
        if isinstance(mask, flex.BlockMask):
            return "blocks"
        if mask.shape[-2] == 1:
            return "keys"
        valid = mask.any(-1, keepdim=True) & mask.any(-2, keepdim=True)
        return "padding" if torch.equal(mask, valid) else "causal"

    def inside(self, sites: tuple[str, ...]) -> str:
        """The innermost of ``sites`` that was running, or the empty string."""
        return next((name for name in reversed(self.running) if name in sites), "")


@contextmanager
def _attention(model: nn.Module) -> Iterator[list[_Call]]:
    """The attention calls of what runs inside. Names are patched: flex_attention compiles a function mode with it."""
    calls: list[_Call] = []
    running: list[str] = []
    dense, blocked = F.scaled_dot_product_attention, flex.flex_attention

    def spy_dense(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **options: Any) -> Any:
        calls.append(_Call(query, key, attn_mask, running))
        return dense(query, key, value, attn_mask=attn_mask, **options)

    def spy_blocked(query: Tensor, key: Tensor, value: Tensor, block_mask: Any = None, **options: Any) -> Any:
        calls.append(_Call(query, key, block_mask, running))
        return blocked(query, key, value, block_mask=block_mask, **options)

    with ExitStack() as stack:
        for name, module in model.named_modules():
            enter = module.register_forward_pre_hook(lambda *_, name=name: running.append(name))
            leave = module.register_forward_hook(lambda *_: (running.pop(), None)[1])
            stack.callback(enter.remove)
            stack.callback(leave.remove)
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", spy_dense))
        stack.enter_context(mock.patch.object(flex, "flex_attention", spy_blocked))
        yield calls
