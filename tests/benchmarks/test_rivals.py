"""The benchmark of other projects' kernels: every row is called rightly and checked; one that hangs costs one row."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.benchmarks import fake_packages
from tests.benchmarks.conftest import BENCHMARKS


@pytest.fixture(scope="module")
def bench(modules: dict[str, ModuleType]) -> Any:
    return modules["rival_process"].Bench(torch.device("cpu"))


def rows_of(modules: dict[str, ModuleType], *kinds: str) -> list[Any]:
    return [kernel for kernel in modules["rival_kernels"].kernels() if kernel.kind in kinds]


def small(modules: dict[str, ModuleType]) -> Any:
    return modules["rival_inputs"].Shape(2, 768, 16)


# ---------------------------------------------------------------- one process


def test_every_rival_is_called_as_its_package_wants_and_agrees_with_float64(
    modules: dict[str, ModuleType], bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_packages.install(monkeypatch)
    kernels = [kernel for kernel in rows_of(modules, "rival", "dense") if "cuDNN " not in f"{kernel.name} "]
    assert {kernel.process for kernel in kernels} == {
        "FlashAttention-3",
        "FlashAttention-4",
        "flash-attn-4 sparse",
        "cuDNN-frontend 64",
        "cuDNN-frontend 128",
        "cuDNN-frontend fp8",
        "FastVideo",
        "SLA",
    }
    for kernel in sorted(kernels, key=lambda kernel: bool(kernel.contiguous)):
        facts = bench.prepare(small(modules), kernel.row)
        assert facts["relative_error"] < 1e-5, kernel.row
        assert bench.inputs.sets[0][0].is_contiguous() == kernel.contiguous
        passes = 3.5 if "backward" in kernel.row else 1.0
        pairs = (1 - facts["measured_sparsity"]) * 2 * 768**2
        assert facts["flops"] == pytest.approx(4 * pairs * 16 * passes)
        assert (kernel.blocks is None) == (facts["measured_sparsity"] == 0)
        times = bench.time(kernel.row, 0, 2)
        assert len(times) == 2
        assert min(times) > 0


@pytest.mark.parametrize("step", ["forward", "forward + backward"])
def test_a_result_that_is_wrong_is_a_failure(
    modules: dict[str, ModuleType], bench: Any, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    fake_packages.install(monkeypatch)
    whole = fake_packages.sparse
    # leaves out the last block of every list: 64 keys of a few hundred
    monkeypatch.setattr(
        fake_packages, "sparse", lambda q, k, v, lut, count, blocks: whole(q, k, v, lut, count - 1, blocks)
    )
    monkeypatch.setattr(modules["rival_inputs"], "PERMILLE", 500)
    bench.inputs = None
    with pytest.raises(ArithmeticError, match=r"wrong: relative error .* to float64"):
        bench.prepare(small(modules), f"FastVideo Triton 64x64 {step}")
    bench.inputs = None


@pytest.mark.parametrize("wrong", [0, 1, 2], ids=["query", "key", "value"])
def test_each_gradient_is_checked(modules: dict[str, ModuleType], wrong: int) -> None:
    inputs_of, shape = modules["rival_inputs"], small(modules)
    inputs = inputs_of.Inputs(shape, torch.device("cpu"), contiguous=False)
    for blocks in (None, (128, 64)):
        query, key, value = inputs.leaves(0)
        if blocks is None:
            out = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        else:
            out = fake_packages.sparse(query, key, value, *inputs.selection(blocks, 0), blocks)[0]
        gradients = list(torch.autograd.grad(out, (query, key, value), inputs.grad_out))
        assert inputs_of.gradient_error(gradients, inputs, blocks) < 1e-5
        gradients[wrong] = gradients[wrong] * 1.1
        assert inputs_of.gradient_error(gradients, inputs, blocks) == pytest.approx(0.1, rel=1e-3)


def test_a_package_that_is_missing_or_does_not_load_is_a_reason(
    modules: dict[str, ModuleType], bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    why = modules["rival_process"].why
    with pytest.raises(ImportError) as missing:
        bench.prepare(small(modules), "thu-ml/SLA 128x64 forward")
    assert why(missing.value) == "not installed: ModuleNotFoundError: No module named 'sparse_linear_attention'"

    def broken(name: str) -> None:
        raise RuntimeError("undefined symbol")

    monkeypatch.setattr(modules["rival_kernels"].importlib, "import_module", broken)
    with pytest.raises(ImportError) as failing:
        bench.prepare(small(modules), "dense FlashAttention-3 forward")
    assert "fa3_fwd_interface does not load: RuntimeError: undefined symbol" in why(failing.value)
    assert why(failing.value).startswith("not installed")


def test_inputs_are_alike_in_every_process_and_memory_order(modules: dict[str, ModuleType]) -> None:
    inputs_of, shape = modules["rival_inputs"].Inputs, small(modules)
    one, other = (inputs_of(shape, torch.device("cpu"), contiguous=contiguous) for contiguous in (False, True))
    assert torch.equal(one.grad_out, other.grad_out)
    for left, right in zip(one.sets[0], other.sets[0], strict=True):
        assert torch.equal(left, right)
        assert left.transpose(1, 2).is_contiguous()
        assert right.is_contiguous()
    assert all(
        torch.equal(*pair) for pair in zip(one.selection((128, 64), 0), other.selection((128, 64), 0), strict=True)
    )


# ---------------------------------------------------------------- the parent


def scripted(connection: Any, device: str) -> None:
    """A process whose rows do what their names say."""
    dead = False
    while True:
        try:
            command = connection.recv()
        except EOFError:
            return
        match command:
            case ("prepare", _, rows):
                for row in rows:
                    connection.send(("begin", row))
                    if "hangs ready" in row:
                        time.sleep(60)
                    if "dies ready" in row:
                        sys.exit(3)
                    facts = {"estimate_ms": 50.0 if "slow" in row else 1.0, "flops": 1e9, "relative_error": 1e-3}
                    connection.send(("failed", row, "no kernel") if "missing" in row else ("ready", row, facts))
                connection.send(("done",))
            case ("heat", _):
                connection.send(("done",))
            case ("time", row, number, repeats):
                dead = dead or ("hangs late" in row and number >= 12)
                if dead:
                    time.sleep(60)
                if "breaks" in row:
                    connection.send(("failed", row, "out of memory"))
                else:
                    connection.send(("times", [2.0 if "slow" in row else 1.0] * repeats))


def run_scripted(
    modules: dict[str, ModuleType], names: dict[str, list[str]], output: Path, budget: float = 60.0, rounds: int = 6
) -> list[dict[str, Any]]:
    """Rows of one shape whose processes are scripted: name of the process -> names of its rows."""
    rivals, kernel_of = modules["rivals"], modules["rival_kernels"].Kernel
    kinds = {"dense": "dense", "ours": "salad"}
    kernels = [
        kernel_of(row, kinds.get(row.split()[0], "rival"), "forward", process, "", (64, 64), lambda _: None)
        for process, rows in names.items()
        for row in rows
    ]
    arguments = ["--device", "cpu", "--row-seconds", "1", "--turn-seconds", "1", "--rounds", str(rounds)]
    options = rivals.parse([*arguments, "--timed-seconds", "0.15"])
    children = {name: rivals.Child(name, "cpu", scripted, "fork") for name in names}
    results = modules["common"].Results(output, {"device": "x"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rivals, "kernels", lambda: kernels)
        rivals.run_shape(small(modules), children, options, modules["common"].Budget(budget), results, {})
    for child in children.values():
        child.end()
    rows: list[dict[str, Any]] = json.loads(output.read_text())
    return rows


def test_rows_are_timed_in_turn_and_compared(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    names = {"a": ["dense one", "dense slow"], "b": ["ours fast"], "c": ["other slow", "other missing"]}
    rows = {row["row"]: row for row in run_scripted(modules, names, tmp_path / "rows.json")}
    assert rows["other missing"]["error"] == "no kernel"
    assert len(rows["ours fast"]["timings_ms"]) == 18, "three in each of six turns"
    assert len(rows["other slow"]["timings_ms"]) == 3, "its time allows no more"
    assert rows["ours fast"]["tflops"] == 1.0
    assert rows["ours fast"]["rate_over"] == {"other slow": 2.0}
    assert (rows["other slow"]["baseline"], rows["other slow"]["speedup"]) == ("dense one", 0.5)
    assert "rate_over" not in rows["dense one"]
    assert all(row["device"] == "x" for row in rows.values())


@pytest.mark.parametrize(
    ("bad", "reason"),
    [("hangs ready", "hangs: not ready in 1 s, its process was killed"), ("dies ready", r"ended \(exit code 3\)")],
)
def test_a_row_that_takes_its_process_down_costs_no_other(
    modules: dict[str, ModuleType], tmp_path: Path, bad: str, reason: str
) -> None:
    names = {"a": ["first", bad, "last"], "b": ["ours"]}
    rows = {row["row"]: row for row in run_scripted(modules, names, tmp_path / "rows.json")}
    assert re.search(reason, rows.pop(bad)["error"])
    assert all(row["error"] is None and len(row["timings_ms"]) == 18 for row in rows.values())


def test_a_row_that_hangs_while_it_is_timed_leaves_what_was_timed(
    modules: dict[str, ModuleType], tmp_path: Path
) -> None:
    names = {"a": ["hangs late", "first"], "b": ["ours", "breaks"]}
    rows = {row["row"]: row for row in run_scripted(modules, names, tmp_path / "rows.json")}
    assert rows["hangs late"]["error"] == "hangs: no answer in 1 s, its process was killed"
    assert len(rows["hangs late"]["timings_ms"]) == 12
    assert rows["first"]["error"] is None
    assert 12 <= len(rows["first"]["timings_ms"]) <= 15
    assert rows["first"]["stopped"].startswith("its process was lost with hangs late forward")
    assert (rows["breaks"]["error"], rows["ours"]["error"]) == ("out of memory", None)


def test_a_row_that_hung_is_not_tried_at_the_next_shape(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    rivals = modules["rivals"]
    kernels = [modules["rival_kernels"].Kernel("x", "rival", "forward", "a", "", (64, 64), lambda _: None)]
    results = modules["common"].Results(tmp_path / "rows.json", {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rivals, "kernels", lambda: kernels)
        options, budget = rivals.parse(["--device", "cpu"]), modules["common"].Budget(None)
        children = {"a": rivals.Child("a", "cpu", scripted, "fork")}
        rivals.run_shape(small(modules), children, options, budget, results, {"x forward": "2x64"})
    assert results.rows()[0]["error"] == "left out: it hung at 2x64"
    assert children["a"].process is None


def test_a_spent_budget_ends_everything_and_says_so(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    rows = run_scripted(modules, {"a": ["hangs ready", "last"]}, tmp_path / "rows.json", budget=0.3)
    assert all(row["error"].startswith("left out: the budget of") for row in rows)


def test_bad_arguments_are_told(modules: dict[str, ModuleType], capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--shapes", "12"], "heads x tokens"),
        (["--only", "nobody"], "no row has 'nobody' in its name; rows: matmul 8192, ours gluon 128x64 forward"),
    ):
        with pytest.raises(SystemExit):
            modules["rivals"].parse(arguments)
        assert message in capsys.readouterr().err
    assert [shape.name for shape in modules["rivals"].parse([]).shapes] == ["12x32768", "40x75520"]


def test_a_run_with_real_processes(tmp_path: Path) -> None:
    from tests.end_to_end.scripts import run_script

    output = tmp_path / "rows.json"
    arguments = ["--quick", "--device", "cpu", "--only", "cuDNN forward", "--output", str(output)]
    run_script(BENCHMARKS / "rivals.py", *arguments, said=tmp_path / "said")
    rows = json.loads(output.read_text())
    assert [row["pass"] for row in rows] == ["forward", "forward + backward"]
    for row in rows:
        assert row["error"].startswith("RuntimeError: No viable backend"), "cuDNN is for GPUs"
        assert {"command", "commit", "torch", "device", "permille", "inputs"} <= set(row)
