"""The order of passes, and the law that nothing is silently dense."""

from __future__ import annotations

import logging
import operator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor, fx
from torch._dynamo.exc import BackendCompilerFailed

import salad_compile
from salad_compile.backend.dynamo import record_graphs
from salad_compile.calls import adapters
from salad_compile.config import BackendOptions
from salad_compile.errors import ConfigError, SaladError, SiteLostError
from salad_compile.kernels import measure_executions
from salad_compile.passes import driver
from salad_compile.passes.context import Context, Counts, Pass
from tests import toys
from tests.support import assert_same, check_rewrite, randomise_branches, relative_error, run

CONFIG = salad_compile.SaladConfig(
    compensation="none", sparsity=0.6, query_block=16, key_block=16, lora_rank=2, min_tokens=64
)


def converted(*layers: nn.Module) -> toys.Stack:
    model = toys.Stack(*(layers or (toys.SelfAttention(), toys.SelfAttention())))
    salad_compile.convert(model, CONFIG, example_inputs=(toys.tokens(),))
    randomise_branches(model)
    return model


def compile_error(model: nn.Module, **options: Any) -> SaladError:
    torch._dynamo.reset()
    with pytest.raises(BackendCompilerFailed) as caught:
        torch.compile(model, backend="salad", options={"lowering": "eager", **options})(toys.tokens())
    assert isinstance(caught.value.inner_exception, SaladError)
    return caught.value.inner_exception


def test_a_vanished_attention_call_is_an_error_compiled_and_not() -> None:
    def unknown(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.transpose(-1, -2) * 8**-0.5).exp()  # no softmax that anybody could recognise
        return weights / weights.sum(-1, keepdim=True) @ v

    model = converted()
    model.layers[1].attend = unknown
    with pytest.raises(SiteLostError, match=r"'layers\.1' ran without SALAD"):
        model(toys.tokens())
    error = compile_error(model)
    assert isinstance(error, SiteLostError)
    assert "1 of 2 converted sites" in str(error)
    assert "layers.1" in str(error)
    assert "optimize_ddp" in str(error)


def test_a_vanished_projection_is_an_error_compiled_and_not() -> None:
    model = converted()
    model.layers[0].q = nn.Linear(toys.WIDTH, toys.WIDTH)
    with pytest.raises(SiteLostError, match=r"'layers\.0' ran without SALAD"):
        model(toys.tokens())
    error = compile_error(model)
    assert isinstance(error, SiteLostError)
    assert "its query projection did not run" in str(error)


def scored(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A bias of the scores, which is no key padding."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.zeros(q.shape[-2], k.shape[-2]))


def per_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A bool mask of the shape that key padding may have, in a model that had none at conversion."""
    mask = torch.ones(q.shape[0], 1, q.shape[-2], k.shape[-2], dtype=torch.bool)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@pytest.mark.parametrize(
    ("attend", "reason"),
    [
        (toys.masked, "attention mask is no key-padding mask"),
        (scored, "attention mask is no key-padding mask"),
        (per_query, "attention mask differs from query to query"),
        (toys.causal, "it is causal"),
    ],
)
def test_what_conversion_did_not_see_is_an_error(attend: toys.Attend, reason: str) -> None:
    """The definition has none of it: computing without it would be silently wrong."""
    model = converted()
    model.layers[0].attend = attend
    with pytest.raises(SiteLostError, match=rf"'layers\.0' cannot run as SALAD: .*{reason}"):
        model(toys.tokens())
    error = compile_error(model)
    assert isinstance(error, SiteLostError)
    assert "1 of 2 converted sites" in str(error)
    assert reason in str(error)


def test_not_strict_warns_and_runs(caplog: pytest.LogCaptureFixture) -> None:
    model = converted()
    model.layers[0].q = nn.Linear(toys.WIDTH, toys.WIDTH)
    torch._dynamo.reset()
    with caplog.at_level(logging.WARNING, "salad_compile"):
        out = torch.compile(model, backend="salad", options={"lowering": "eager", "strict": False})(toys.tokens())
    assert "1 of 2 converted sites" in caplog.text
    assert out.isfinite().all()


def broken(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return toys.positional(q, k, v)


def test_a_graph_break_inside_attention_modules_leaves_them_uncompiled_as_salad(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = converted(toys.SelfAttention(broken), toys.CrossAttention(), toys.SelfAttention(broken))
    expected = run(model, {"x": toys.tokens()})
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="salad", options={"lowering": "aot_eager"})
    with caplog.at_level(logging.WARNING, "salad_compile"), record_graphs() as graphs:
        for _ in range(2):  # the second time nothing is left to find out
            with measure_executions() as executions:
                actual = run(compiled, {"x": toys.tokens()}, parameters=model)
            assert_same(actual, expected)
            assert len(executions) == 2
    (warning,) = [r.getMessage() for r in caplog.records if "uncompiled" in r.getMessage()]
    assert "the graph breaks inside layers.0 and 1 more of its class" in warning
    assert 'TORCH_LOGS="graph_breaks"' in warning
    assert [graph.uncompiled for graph in graphs if graph.uncompiled] == [("layers.0", "layers.2")]
    assert not any(graph.lost for graph in graphs)
    # cross-attention between them is compiled, and dense
    assert "dense" in [call.status for graph in graphs for call in graph.calls]


def test_a_graph_break_in_a_helper_that_ran_before_the_projection_is_survived() -> None:
    class Late(toys.SelfAttention):
        def forward(self, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return super().forward(x)

    model = converted(Late(), Late())
    expected = run(model, {"x": toys.tokens()})
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="salad", options={"lowering": "aot_eager"})
    with measure_executions() as executions:
        assert_same(run(compiled, {"x": toys.tokens()}, parameters=model), expected)
    assert len(executions) == 2


def padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The last 9 keys are padding."""
    mask = (torch.arange(k.shape[-2]) < k.shape[-2] - 9).expand(k.shape[0], 1, 1, -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def test_key_padding_that_conversion_did_not_see_is_obeyed() -> None:
    """(B, 1, 1, S) bool is key padding whatever it holds: the graph needs no other conversion for it."""
    model = converted()
    unmasked = model(toys.tokens())
    model.layers[0].attend = padded
    check_rewrite(model, {"x": toys.tokens()}, sites=2)
    assert relative_error(model(toys.tokens()), unmasked) > 1e-3


def test_dropout_of_a_converted_site_is_left_out_with_one_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapters, "_warned_of_dropout", set())
    model = converted()
    expected = model(toys.tokens())
    for layer in model.layers:
        layer.attend = toys.dropped
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="salad", options={"lowering": "eager"})
    with caplog.at_level(logging.WARNING, "salad_compile"):
        assert torch.equal(model(toys.tokens()), expected)
        assert relative_error(compiled(toys.tokens()), expected) < 1e-6
    assert [r.getMessage() for r in caplog.records if r.name.startswith("salad_compile")] == [
        "converted attention leaves out the dropout of its weights (p=0.1)"
    ]


def test_the_compiler_alone_warns_of_dropout_too(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapters, "_warned_of_dropout", set())
    model = converted(toys.SelfAttention(toys.dropped))
    torch._dynamo.reset()
    with caplog.at_level(logging.WARNING, "salad_compile"):
        torch.compile(model, backend="salad", options={"lowering": "eager"})(toys.tokens())
    assert "leaves out the dropout of its weights (p=0.1)" in caplog.text


def test_self_attention_that_the_conversion_left_dense_stays_dense() -> None:
    class Both(nn.Module):
        """Video tokens and a shorter second stream, each with its own self-attention."""

        def __init__(self) -> None:
            super().__init__()
            self.video, self.other = toys.SelfAttention(), toys.SelfAttention()

        def forward(self, x: Tensor, audio: Tensor) -> Tensor:
            return self.video(x) + self.other(audio).mean(1, keepdim=True)

    inputs = {"x": toys.tokens(90), "audio": toys.tokens(70)}
    model = salad_compile.convert(Both(), CONFIG, example_inputs=inputs)
    assert [name for name, _ in model.named_modules() if name.endswith("salad")] == ["video.salad"]
    with record_graphs() as graphs:
        options = {"lowering": "eager", "min_tokens": 1}
        compiled = torch.compile(model, backend="salad", options=options)(**inputs)
        # the second stream in a graph of its own: nothing there says that the model was converted, but for the tag
        torch.compile(model.other, backend="salad", options=options)(inputs["audio"])
    assert relative_error(compiled, model(**inputs)) < 1e-6
    assert [(call.status, call.reason) for graph in graphs for call in graph.calls] == [
        ("salad", ""),
        ("dense", "the conversion left it dense"),
        ("dense", "the conversion left it dense"),
    ]


def test_options_that_contradict_the_conversion_are_an_error() -> None:
    error = compile_error(converted(), sparsity=0.9)
    assert isinstance(error, ConfigError)
    assert "sparsity=0.9" in str(error)
    torch._dynamo.reset()
    model = converted()
    same = torch.compile(model, backend="salad", options={"lowering": "eager", "sparsity": 0.6, "key_block": 16})
    assert relative_error(same(toys.tokens()), model(toys.tokens())) < 1e-6


def test_graphs_are_logged_before_and_after(caplog: pytest.LogCaptureFixture) -> None:
    model = converted(toys.SelfAttention())
    torch._dynamo.reset()
    with caplog.at_level(logging.DEBUG, "salad_compile"):
        torch.compile(model, backend="salad", options={"lowering": "eager"})(toys.tokens())
    before, after = (next(r.message for r in caplog.records if r.message.startswith(w)) for w in ("before", "after"))
    assert "scaled_dot_product_attention" in before
    assert "salad.tag" in before
    assert "salad.block_sparse_attention" in after
    assert "salad.tag" not in after
    assert "1 attention calls, 1 salad, 0 block-sparse, 0 dense, 0 lost" in caplog.text
    passes = [r.message.split()[1] for r in caplog.records if r.message.startswith("pass: ")]
    assert passes == [entry.name for entry in driver.PASSES]


def count_linears(graph: fx.Graph, context: Context) -> Counts:
    """A pass as somebody would add one: counts projections, and replaces their results by themselves, twice negated."""
    linears = [node for node in graph.nodes if node.target is F.linear]
    for node in linears:
        with graph.inserting_after(node):
            negated = graph.call_function(operator.neg, (node,))
        with graph.inserting_after(negated):
            again = graph.call_function(operator.neg, (negated,))
        for new in (negated, again):
            new.meta["example_value"] = node.meta["example_value"]
        node.replace_all_uses_with(again, delete_user_cb=lambda user, kept=negated: user is not kept)
    return {"linears": len(linears), "calls": len(context.calls[graph])}


def test_a_pass_is_added_by_one_entry_in_the_list(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It runs over nested graphs too, and appears in the report, in `explain` and among the dumped graphs."""
    monkeypatch.setattr(driver, "PASSES", (*driver.PASSES, Pass("count_linears", count_linears)))
    model = converted()
    model.recompute = True
    expected = model(toys.tokens())
    torch._dynamo.reset()
    options = {"lowering": "aot_eager", "dump_graphs": str(tmp_path)}
    with record_graphs() as graphs:
        actual = torch.compile(model, backend="salad", options=options, fullgraph=True)(toys.tokens())
    assert relative_error(actual, expected) < 1e-6
    (graph,) = graphs
    *_, erased, added = graph.passes
    # two layers of four projections, three of them with an update of two products, the output's as well
    assert added.counts == {"linears": 2 * (4 + 4 * 2 + 1), "calls": 2}
    assert erased.counts == {"tags": 2, "sites": 2, "projected": 2}
    assert [report.name for report in graph.passes] == [entry.name for entry in driver.PASSES]
    assert 0 < sum(report.seconds for report in graph.passes) < graph.seconds
    explanation = salad_compile.explain(model, toys.tokens())
    assert "count_linears" in explanation.notes()[-1]
    assert f"({added.counts['linears']} linears, 2 calls)" in explanation.notes()[-1]
    assert explanation.to_dict()["graphs"][0]["passes"][0]["counts"] == {"salad": 2}
    names = {file.name for file in (tmp_path / "graph_0").iterdir()}
    files = sorted(names - {"passes.txt"}, key=lambda name: int(name.partition("_")[0]))
    told = "0_captured.txt 6_rewrite_attention.txt 9_spare_memory.txt 10_erase_markers.txt 11_count_linears.txt"
    assert files == told.split()
    assert len(names) == len(files) + 1
    before, after = ((tmp_path / "graph_0" / name).read_text() for name in files[3:5])
    assert "neg" not in before
    assert "neg" in after


def test_each_graph_is_dumped_into_a_folder_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "graph_1").mkdir()  # of another run
    model = converted()
    torch._dynamo.reset()
    for tokens in (70, 90, 110):  # the second time sizes become symbols
        compiled = torch.compile(model, backend="salad", options={"lowering": "eager", "dump_graphs": tmp_path})
        compiled(toys.tokens(tokens))
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["graph_0", "graph_1", "graph_2"]
    assert not list((tmp_path / "graph_1").iterdir())
    assert "replay_position" in (tmp_path / "graph_2" / "passes.txt").read_text()
    names = ("0_captured.txt", "10_erase_markers.txt")
    captured, erased = ((tmp_path / "graph_0" / name).read_text() for name in names)
    assert "salad.tag" in captured
    assert "salad.tag" not in erased
    assert "salad.block_sparse_attention" in erased


def test_a_folder_for_graphs_is_a_path() -> None:
    with pytest.raises(ConfigError, match="dump_graphs is the path of a folder, got 3"):
        BackendOptions.from_options({"dump_graphs": 3})
