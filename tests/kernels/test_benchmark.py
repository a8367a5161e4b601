"""The benchmarks of the kernels run on a CPU and leave complete rows."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end import scripts

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run_script(name: str, output: Path, *arguments: str) -> tuple[list[dict[str, Any]], str]:
    options = ["--quick", "--output", str(output), *arguments]
    printed = scripts.run_script(BENCHMARKS / name, *options, said=output.with_suffix(".said"))
    rows: list[dict[str, Any]] = json.loads(output.read_text())
    return rows, printed


def test_quick_cpu_run_writes_complete_rows(tmp_path: Path) -> None:
    rows, printed = run_script("attention_cpu.py", tmp_path / "rows.json")
    assert all(row["row"] in printed for row in rows)
    names = " ".join(row["row"] for row in rows)
    for wanted in ("dense SDPA", "dense matmuls bfloat16", "block-sparse forward + backward", "operator forward"):
        assert wanted in names
    for row in rows:
        assert row["threads"] == 2
        assert 0.7 <= row["measured_sparsity"] <= 0.8  # 2 of 8 blocks
        assert len(row["timings_ms"]) == 2
        assert min(row["timings_ms"]) > 0
        assert row["baseline"] in names


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], str]:
    """Rows and output of the GPU benchmark, on the CPU."""
    wanted = ["--shapes", "1.3B-480p", "length-5120", "sparsity", "--sparsity", "0.75", "0.5"]
    output = tmp_path_factory.mktemp("benchmark") / "rows.json"
    return run_script("attention.py", output, "--device", "cpu", *wanted)


def test_quick_run_of_the_gpu_benchmark_writes_complete_rows(quick_run: tuple[list[dict[str, Any]], str]) -> None:
    rows, printed = quick_run
    failed = [row for row in rows if row["error"]]
    assert all(row["error"].startswith("not installed") and not row["timings_ms"] for row in failed), failed
    for row in rows:
        assert row["row"] in printed
        for name in ("command", "commit", "torch", "triton", "python", "device", "seed", "inputs", "heads", "tokens"):
            assert name in row
        if row["error"]:
            continue
        assert len(row["timings_ms"]) == 2
        assert min(row["timings_ms"]) > 0
        assert row["kind"] == "ceiling" or row["baseline"] == "dense SDPA"
    main = {(row["row"], row["pass"]): row for row in rows if row["case"] == "1.3B-480p" and not row["error"]}
    for step in ("forward", "forward + backward", "backward"):
        assert ("dense SDPA", step) in main
        assert (f"block-sparse {step}", step) in main
    for name in ("operator forward", "operator + Proj forward", "routing alone", "linear branch alone", "copy"):
        assert (name, "forward") in main
    assert {row["sparsity"] for row in rows if row["case"] == "sparsity" and row["kind"] == "salad"} == {0.75, 0.5}


def test_flops_are_those_of_computed_pairs(quick_run: tuple[list[dict[str, Any]], str]) -> None:
    rows = [row for row in quick_run[0] if row["case"] == "1.3B-480p"]
    everything = 4 * 2 * 511**2 * 32  # 2 heads, 511 tokens, 32 channels
    factor = {"forward": 1.0, "backward": 2.5, "forward + backward": 3.5}
    checked = [row for row in rows if "flops" in row and row["kind"] != "ceiling"]
    assert {row["pass"] for row in checked} == set(factor)
    for row in checked:
        share = 1 - row["measured_sparsity"]
        assert abs(row["flops"] / (everything * factor[row["pass"]] * share) - 1) < 1e-6
    whole = [row for row in rows if row["row"] == "block-sparse forward" and row["sparsity"] == 0.0]
    assert whole[0]["measured_sparsity"] == 0
    assert whole[0]["difference_to_dense"] < 1e-5
