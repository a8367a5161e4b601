"""Recording launches in the place of running them."""

from __future__ import annotations

import pytest
import torch

from salad_compile.kernels.launch import interpreting, launch, record_launches, recording


def test_recordings_nest() -> None:
    def note(number: int) -> None:
        launch(None, (1,), torch.device("cpu"), num_warps=4, NUMBER=number)

    with record_launches() as outer:
        with record_launches() as inner:
            pass
        note(0)
        with record_launches() as other:
            note(1)
        assert recording()
    assert not recording()
    assert [[recorded.constants["NUMBER"] for recorded in seen] for seen in (outer, inner, other)] == [[0], [], [1]]


@pytest.mark.parametrize(("value", "interprets"), [("1", True), ("on", True), ("0", False), ("", False)])
def test_the_environment_says_whether_triton_interprets(
    value: str, interprets: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", value)
    assert interpreting() is interprets
