"""The two placements on every video DiT: its own position encoding is found and replayed, or left where it is."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from salad_compile.definition.operands import Mapped
from salad_compile.position.sequences import PositionRecording
from salad_compile.position.slice import Entry
from tests.models.expectations import WITHOUT_POSITION, converted_sites
from tests.models.kinds import CONVERTED, KINDS, ROTATIONS, by_default, marks_of
from tests.models.test_zoo import _flex_under_autograd, _fresh_dynamo, bounds
from tests.models.zoo import Case
from tests.support import Recorder, converted, relative_error, run, seeded

FIXTURES = (_fresh_dynamo, _flex_under_autograd)
# Compiled, test_zoo.py takes every case through the default, which is map-then-rotate: these stand for the ways of
# writing in place, for one stream and two, and go through AOTAutograd with either placement.
THROUGH_AOT = ("Wan", "LTX2Video", "ConsisID", "EasyAnimate", "Cosmos3Omni")
# Averages the rotations of compressed frames, which makes tokens shorter.
NO_ROTATIONS = ("HunyuanVideoFramepack",)

_mapped = PositionRecording.mapped


def _as_it_is(entry: Entry, value: Tensor, feature_map: str) -> tuple[Tensor, Tensor]:
    return value.clone(), value.clone()


def _with_noise(entry: Entry, value: Tensor, feature_map: str) -> tuple[Tensor, Tensor]:
    """Every token and head has another length."""
    with seeded(1):
        noisy = value * torch.randn(value.shape).to(value)
    return noisy, noisy.clone()


class _Checked:
    """Stands in for `PositionRecording.mapped`, and first replays what is known beforehand."""

    def __init__(self, bound: float) -> None:
        self.found: list[bool] = []
        self.bound = bound

    def __call__(
        self, recording: PositionRecording, query: Tensor, key: Tensor, feature_map: str, site: str
    ) -> Mapped | None:
        def replay(begin: Any) -> Mapped | None:
            with mock.patch.object(Entry, "begin", begin):
                return _mapped(recording, query, key, feature_map, site)

        mapped = replay(_as_it_is)
        self.found.append(mapped is not None)
        if mapped is not None:
            # without the map the operands come back, but for a scale of the scores
            assert relative_error(_unit(mapped.rotated_query), _unit(query)) < 1e-6
            assert relative_error(_unit(mapped.rotated_key), _unit(key)) < 1e-6
            mapped = replay(_with_noise)
            assert mapped is not None
            # a rotation keeps the length of every token and head, where it lies
            for plain, rotated in ((mapped.query, mapped.rotated_query), (mapped.key, mapped.rotated_key)):
                lengths = [value.float().norm(dim=-1) for value in (rotated, plain)]
                assert relative_error(*lengths) < self.bound
        return _mapped(recording, query, key, feature_map, site)


def _unit(value: Tensor) -> Tensor:
    return value / value.norm()


@by_default(KINDS | ROTATIONS)
def test_position_is_replayed(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = converted(case, sparsity=0.5), case.inputs(0)
    checked = _Checked(0.1 if case.name in NO_ROTATIONS else bounds(case)["bound"])
    with monkeypatch.context() as patch:
        patch.setattr(PositionRecording, "mapped", lambda *arguments: checked(*arguments))
        expected = run(model, inputs, case.output, gradients=False)
    sites = len(converted_sites(case)) * case.calls
    assert checked.found == [case.name not in WITHOUT_POSITION] * sites
    if case.name not in WITHOUT_POSITION:
        other = converted(case, sparsity=0.5, rope_placement="rotate-then-map")
        left = run(other, inputs, case.output, gradients=False)
        assert relative_error(left.output, expected.output) > 1e-3, "the placement changes nothing"


# every other test that compiles Wan takes the first
@pytest.mark.parametrize("placement", [pytest.param("map-then-rotate", marks=pytest.mark.all_cases), "rotate-then-map"])
@pytest.mark.parametrize("name", [pytest.param(name, marks=marks_of(name, ["Wan"])) for name in THROUGH_AOT])
def test_either_placement_compiles(name: str, placement: str) -> None:
    case = CONVERTED[name]
    model, inputs = converted(case, sparsity=0.5, rope_placement=placement), case.inputs(0)
    expected = run(model, inputs, case.output, gradients=False)
    recorder = Recorder()
    compiled = torch.compile(model, backend=recorder, fullgraph=case.fullgraph)
    actual = run(compiled, inputs, case.output, parameters=model, gradients=False)
    assert relative_error(actual.output, expected.output) <= bounds(case)["bound"]
    assert recorder.after["salad.projected"] == 0
    sites = recorder.after["salad.block_sparse_attention"]
    assert sites
    assert recorder.after["salad.linear_state"] == recorder.after["salad.linear_output"] == sites
