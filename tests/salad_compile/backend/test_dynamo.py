"""The backend's options, modes, announcements and lowerings."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch._dynamo.exc import BackendCompilerFailed

import salad_compile
from salad_compile.backend import announcements, cpu_fusion
from salad_compile.backend import dynamo as backend
from salad_compile.backend.dynamo import record_graphs
from salad_compile.definition import patterns
from salad_compile.errors import ConfigError, WrongBackendError
from salad_compile.kernels.rows import decompositions
from tests import toys
from tests.support import randomise_branches, relative_error

SMALL = {"query_block": 16, "key_block": 16, "min_tokens": 64, "lowering": "eager"}
CONFIG = salad_compile.SaladConfig(
    compensation="none", sparsity=0.6, query_block=16, key_block=16, lora_rank=2, min_tokens=64
)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(announcements, "_announced", set())
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def converted() -> nn.Module:
    model = salad_compile.convert(toys.SelfAttention(), CONFIG, example_inputs=(toys.tokens(),))
    randomise_branches(model)
    return model


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsty": 0.5}, "Did you mean 'sparsity'"),
        ({"sparsity": 1}, r"\[0, 1\)"),
        ({"sparsity": "0.5"}, r"\[0, 1\)"),
        ({"query_block": 100}, "query_block must be one of"),
        ({"min_tokens": -1}, "0 or more"),
        ({"lowering": "inductr"}, "Did you mean 'inductor'"),
        ({"strict": "yes"}, "True or False"),
        ({"inductor": ["max_autotune"]}, "dictionary"),
    ],
)
def test_wrong_options_are_errors(options: dict[str, Any], message: str) -> None:
    model = torch.compile(toys.SelfAttention(), backend="salad", options=options)
    for _ in range(2):  # the graph is kept, and goes on refusing
        with pytest.raises(ConfigError, match=message) as caught:  # and not torch's BackendCompilerFailed
            model(toys.tokens())
        assert str(caught.value).startswith('torch.compile(backend="salad"): ')


def test_an_unknown_pattern_is_looked_up_again_at_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"pattern": "top-k", "lowering": "eager", "min_tokens": 0}
    model = torch.compile(toys.SelfAttention(), backend="salad", options=options)
    with pytest.raises(BackendCompilerFailed, match="'topk'") as caught:
        model(toys.tokens())
    assert isinstance(caught.value.inner_exception, ConfigError)
    monkeypatch.setitem(patterns._loaded, "top-k", patterns.find("topk"))
    assert model(toys.tokens()).isfinite().all()


@pytest.mark.parametrize("lowering", ["eager", "aot_eager"])
def test_lowerings_agree(lowering: str) -> None:
    model, x = converted(), toys.tokens()
    compiled = torch.compile(model, backend="salad", options={"lowering": lowering})
    assert relative_error(compiled(x), model(x)) < 1e-5


def test_modes_and_inductor_options_reach_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def compile_fx(gm: Any, inputs: Any, inner_compile: Any, config_patches: dict[str, Any] | None) -> Any:
        assert inner_compile is cpu_fusion.inner_compile
        # ours among Inductor's own: a table that is passed would be part of the key of its caches
        table = torch._inductor.decomposition.select_decomp_table()
        assert torch.ops.salad.take_rows.default in table
        assert torch.ops.aten.native_layer_norm.default in table
        with torch._inductor.config.patch(config_patches or {}):  # Inductor knows all of them
            seen.append(config_patches or {})
        return gm.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    model = converted()
    for mode in ("reduce-overhead", "max-autotune"):
        torch.compile(model, backend="salad", mode=mode)(toys.tokens())
        torch._dynamo.reset()
    torch.compile(model, backend="salad", options={"inductor": {"epilogue_fusion": False}})(toys.tokens())
    torch._dynamo.reset()
    torch.compile(model, backend="salad")(toys.tokens())
    assert seen[0]["triton.cudagraphs"] is True
    assert seen[1]["max_autotune"] is True
    assert seen[2]["epilogue_fusion"] is False
    assert seen[3] == {}


def test_unknown_modes_are_errors() -> None:
    model = torch.compile(converted(), backend=lambda gm, inputs: backend.salad(gm, inputs, mode="max-autotun"))
    with pytest.raises(ConfigError, match=r"unknown mode 'max-autotun'.*Did you mean 'max-autotune'"):
        model(toys.tokens())


def test_an_unconverted_model_is_announced_once(caplog: pytest.LogCaptureFixture) -> None:
    model = toys.SelfAttention()
    with caplog.at_level(logging.WARNING, "salad_compile"), record_graphs() as graphs:
        for _ in range(2):
            torch.compile(model, backend="salad", options=SMALL)(toys.tokens())
            torch._dynamo.reset()
    assert [graph.count("block-sparse") for graph in graphs] == [1, 1]
    (record,) = [r for r in caplog.records if r.name.startswith("salad_compile")]
    for part in ("sparsity 0.5", "options={'sparsity'", "quality", "convert(model)"):
        assert part in record.getMessage()


def test_short_models_stay_dense_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    model, x = toys.SelfAttention(), toys.tokens()
    with caplog.at_level(logging.WARNING, "salad_compile"):
        out = torch.compile(model, backend="salad", options={"lowering": "eager"})(x)
    assert torch.equal(out, model(x))
    assert "stays dense: 70 tokens, fewer than min_tokens=8192" in caplog.text


def test_sparsity_zero_of_an_unconverted_model_equals_dense() -> None:
    model, x = toys.SelfAttention(), toys.tokens()
    out = torch.compile(model, backend="salad", options={**SMALL, "sparsity": 0})(x)
    assert relative_error(out, model(x)) < 1e-6


@pytest.mark.parametrize("other", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("training", [False, True])
def test_another_backend_on_a_converted_model_is_an_error(other: str, training: bool) -> None:
    model = converted()
    compiled = torch.compile(model, backend=other)
    with (
        torch.set_grad_enabled(training),
        pytest.raises((WrongBackendError, BackendCompilerFailed), match="backend='salad'") as caught,
    ):
        compiled(toys.tokens())
    inner = getattr(caught.value, "inner_exception", caught.value)
    assert isinstance(inner, WrongBackendError)


def test_training_an_unconverted_model_has_gradients_everywhere() -> None:
    model, x = toys.SelfAttention(), toys.tokens()
    compiled = torch.compile(model, backend="salad", options={**SMALL, "lowering": "aot_eager"})
    compiled(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for name, p in model.named_parameters() if name != "k.bias")


def test_dynamic_lengths_around_the_threshold() -> None:
    """On a symbolic length the threshold is a guard: one graph on each side, and each is right."""
    model = toys.SelfAttention()
    with record_graphs() as graphs:
        compiled = torch.compile(model, backend="salad", options={**SMALL, "sparsity": 0}, dynamic=True)
        for count in (70, 33, 91, 40, 128, 65):
            assert relative_error(compiled(toys.tokens(count)), model(toys.tokens(count))) < 1e-6
    assert sorted(graph.calls[0].status for graph in graphs) == ["block-sparse", "dense"]


def test_inductor_knows_our_decompositions_wherever_it_looks() -> None:
    """`fast_random_decomps` is private, and keeps a copy of the table (torch 2.11 and 2.13)."""
    from torch._inductor import decomposition

    decomposition.fast_random_decomps()  # a copy from before, if nothing was compiled yet
    backend._teach_inductor.cache_clear()
    backend._teach_inductor()
    for table in (decomposition.decompositions, decomposition.fast_random_decomps()):
        assert decompositions().keys() <= table.keys()
