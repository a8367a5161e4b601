"""No number in the tables of speed that is not in benchmarks/results/."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MACHINE = {
    "command": "python benchmarks/x.py",
    "commit": "0123456789abcdef",
    "device": "NVIDIA Imaginary",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "cuda": "13.0",
    "driver": "580.1",
}


@pytest.fixture(scope="module")
def measured() -> ModuleType:
    spec = importlib.util.spec_from_file_location("measured", ROOT / "tools" / "measured.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A folder with the CPU's rows, to which a test adds rows of a GPU that does not exist."""
    for name in ("attention_cpu.json", "quickstart_cpu.json"):
        shutil.copy(RESULTS / name, tmp_path)
    return tmp_path


def kernel_row(name: str, kind: str, step: str, ms: float, **facts: Any) -> dict[str, Any]:
    shape = {"case": "1.3B-480p", "tokens": 32_760, "heads": 12, "head_dim": 128, "dtype": "bfloat16"}
    timings = {"median_ms": ms, "p10_ms": ms * 0.9, "p90_ms": ms * 1.1, "error": None}
    return {**MACHINE, **shape, "row": name, "kind": kind, "pass": step, **timings, **facts}


def test_the_block_is_what_the_raw_rows_say(measured: ModuleType) -> None:
    assert measured.render() in (ROOT / "docs" / "speed.md").read_text(), "run: python tools/measured.py"
    assert measured.render_videos() in (ROOT / "README.md").read_text(), "run: python tools/measured.py"


def test_bursts_are_a_column_of_their_own(measured: ModuleType, results: Path) -> None:
    burst = {"burst_median_ms": 1.5, "burst_speedup": 3.5}
    dense = kernel_row("dense FlashAttention-4", "dense", "forward", 8.0, burst_median_ms=6.0, burst_speedup=1.0)
    ours = kernel_row("block-sparse forward", "salad", "forward", 2.0, speedup=4.0, **burst)
    (results / "attention_x.json").write_text(json.dumps([dense, ours]))
    block = measured.render(results)
    assert "best dense / row | in a burst |" in block
    assert "| 4.00x | 1.50, 3.50x |" in block
    assert "in turn, under load." in block
    about = {"layers": 30, "measured_sparsity": 0.9, "working_bytes": None}
    step = "denoising step"
    rows = [
        kernel_row("dense", "dense", step, 400.0, **about, dense_attention="FlashAttention-4"),
        kernel_row("SALAD", "salad", step, 200.0, **about, speedup=2.0, **burst),
    ]
    (results / "transformer_x.json").write_text(json.dumps(rows))
    block = measured.render(results)
    assert "400.0 (360.0 to 440.0), FlashAttention-4 | 200.0" in block
    assert "**2.00x** | -, - | 1.50, 3.50x |" in block
    assert "runs on the kernel beside its time" in block


def test_the_rivals_are_what_the_raw_rows_say(measured: ModuleType) -> None:
    assert measured.render_rivals() in (ROOT / "docs" / "kernels.md").read_text(), "run: python tools/measured.py"


def test_rivals_are_one_table_with_their_reasons(measured: ModuleType, results: Path) -> None:
    assert "Not measured yet." in measured.render_rivals(results)
    about = {"relative_error": 2e-3, "tflops": 600.0}
    ours, rival = "ours gluon 128x64", "FlashAttention-4 block-sparse 128x128"
    rows = [
        kernel_row("matmul 8192", "ceiling", "forward", 1.5, tflops=730.0),
        kernel_row(ours, "salad", "forward + backward", 4.5, **about),
        kernel_row(ours, "salad", "forward", 1.0, **about, rate_over={rival: 1.1234}),
        kernel_row(rival, "rival", "forward", 1.125, **about),
        {**kernel_row("SLA", "rival", "forward", 1.0), "error": "not installed: no module"},
    ]
    (results / "rivals_x.json").write_text(json.dumps([{**row, "case": "12x32768"} for row in rows]))
    block = measured.render_rivals(results)
    assert "| **ours gluon 128x64 forward** | 1.00 (0.90 to 1.10) | 600 | 2e-03 |" in block
    assert "| matmul 8192 | 1.50 (1.35 to 1.65) | 730 |  |" in block
    assert "| SLA forward | - | - |  |" in block
    assert f"Rates, 12x32768: {ours} forward **1.12x** {rival}." in block
    assert "- SLA forward: not installed: no module" in block
    assert block.index("SLA forward |") < block.index("forward + backward"), "forwards first"


def test_without_gpu_rows_the_block_has_no_gpu_part(measured: ModuleType, results: Path) -> None:
    block = measured.render(results)
    assert "Kernels," not in block
    assert "Whole steps," not in block
    assert "Operators," in block


def test_the_kernel_table(measured: ModuleType, results: Path) -> None:
    blocks = {"query_block": 128, "key_block": 64, "sparsity": 0.9, "measured_sparsity": 0.8995}
    rate = {"tflops": 444.0, "peak_share": 0.555}
    rows = [
        kernel_row("matmul 8192", "ceiling", "forward", 1.4, tflops=800.0, peak_share=1.0),
        kernel_row("copy", "ceiling", "forward", 0.7, gigabytes_per_s=3012.0),
        kernel_row("dense SDPA flash", "dense", "forward", 20.0, tflops=300.0, peak_share=0.375, speedup=0.5),
        kernel_row("dense SDPA cuDNN", "dense", "forward", 10.0, tflops=600.0, peak_share=0.75, speedup=1.0),
        kernel_row("block-sparse forward", "salad", "forward", 1.6, speedup=6.25, **blocks, **rate),
        kernel_row("block-sparse forward", "salad", "forward", 9.9, speedup=1.0, **blocks | {"sparsity": 0.0}, **rate),
        kernel_row("routing + linear branch", "salad", "forward", 0.1234, speedup=81.0),
        {
            **MACHINE,
            "row": "operator forward",
            "case": "1.3B-480p",
            "kind": "salad",
            "pass": "forward",
            "error": "Oops",
        },
        {**MACHINE, "row": "SLA", "case": "1.3B-480p", "kind": "rival", "pass": "forward", "error": "not installed: x"},
    ]
    (results / "attention_imaginary.json").write_text(json.dumps(rows))
    block = measured.render(results)
    assert "`python benchmarks/x.py`: NVIDIA Imaginary, torch 2.11.0, Triton 3.6.0, CUDA 13.0, driver 580.1" in block
    assert "blocks of 128 x 64, sparsity 0.9 (0.8995 measured)" in block
    assert "`matmul 8192` reached 800 TFLOP/s, the peak and a copy 3,012 GB/s" in block
    assert "| 1.3B-480p | dense SDPA cuDNN forward | 10.00 (9.00 to 11.00) | 600 | 75% | 1.00x |" in block
    assert "| 1.3B-480p | block-sparse forward | 1.60 (1.44 to 1.76) | 444 | 56% | 6.25x |" in block
    assert "| 1.3B-480p | routing + linear branch | 0.12 (0.11 to 0.14) |  |  | 81.00x |" in block
    assert "SDPA flash" not in block, "only the best dense kernel"
    assert "Without a timing there: 1 not installed, 1 failed." in block
    assert measured.render(RESULTS) in (ROOT / "docs" / "speed.md").read_text(), "other folders change nothing"


def test_the_table_of_whole_steps(measured: ModuleType, results: Path) -> None:
    def step_row(kind: str, sparsity: float, ms: float, **facts: Any) -> dict[str, Any]:
        about = {"layers": 30, "measured_sparsity": sparsity, "working_bytes": 3 * 2**30}
        return kernel_row(f"{kind}, torch.compile", kind, "denoising step", ms, **about, **facts)

    rows = [
        step_row("dense", 0.0, 500.0),
        step_row("salad", 0.8995, 250.0, speedup=2.0),
        step_row("dense", 0.0, 510.0),
        {**step_row("salad", 0.8, 1.0), "error": "OutOfMemoryError"},
        {**MACHINE, "row": "all rows", "case": "14B-720p", "kind": "none", "pass": "denoising step",
         "error": "left out: the budget of 280 s was spent"},
    ]  # fmt: skip
    (results / "transformer_imaginary.json").write_text(json.dumps(rows))
    block = measured.render(results)
    assert (
        "| 1.3B-480p, 30 layers, 32,760 tokens | denoising step | 0.899 | 500.0 (450.0 to 550.0) | "
        "250.0 (225.0 to 275.0) | **2.00x** | 3.0, 3.0 |" in block
    )
    assert "510.0" not in block, "its only partner failed"
    assert "Without a timing there: 1 left out, 1 failed." in block


def test_rows_of_several_runs_name_each_run(measured: ModuleType, results: Path) -> None:
    about = {"layers": 30, "measured_sparsity": 0.9, "working_bytes": 2**30, "speedup": 2.0}
    one, other = (
        {**kernel_row("SALAD", "salad", step, 1.0, **about), "command": command}
        for step, command in (("denoising step", "python a.py"), ("training step", "python b.py"))
    )
    dense = kernel_row("dense", "dense", "denoising step", 2.0, **about)
    (results / "transformer_imaginary.json").write_text(json.dumps([dense, one, other]))
    block = measured.render(results)
    assert "denoising step: `python a.py`, " in block
    assert "training step: `python b.py`, " in block


def test_a_video_is_derived_from_the_forward_that_was_timed(measured: ModuleType, results: Path) -> None:
    def step(kind: str, ms: float, name: str = "denoising step", **facts: Any) -> dict[str, Any]:
        sizes = {"parameter_bytes": 3 * 2**30, "working_bytes": 2**30, "sparsity": 0.9}
        return kernel_row(kind, kind, name, ms, **sizes, **facts)

    assert "Not measured on a GPU yet." in measured.render_videos(results)
    rows = [
        step("dense", 2000.0, dense_attention="FlashAttention-4"),
        step("salad", 800.0, speedup=2.5),
        step("salad", 900.0, "training step", speedup=2.0),
    ]
    (results / "transformer_imaginary.json").write_text(json.dumps(rows))
    block = measured.render_videos(results)
    assert "| transformer, one forward, dense (measured) | 2.00 s, FlashAttention-4 |" in block
    assert "| **dense / SALAD** (measured) | **2.50x** |" in block
    assert "| a video, dense (derived) | 3 min 20 s |" in block, "50 steps with two forwards each"
    assert "| a video, SALAD (derived) | 80 s |" in block
    assert "| 4.0, 4.0 GiB |" in block
    assert "| fine-tuning (derived) | 3.2 h |" in block, "1,600 steps of 8 clips"
    capped = {"quick": False, "memory_gib": 24.0, "steps": 40, "measured_paper_h": 9.0}
    trained = [{"quick": False, "steps": steps, "measured_paper_h": hours} for steps, hours in ((6, 3.3), (20, 3.4))]
    (results / "training_recipe_imaginary.json").write_text(json.dumps([capped, *trained]))
    assert "| fine-tuning (derived) | 3.4 h |" in measured.render_videos(results), "the trainer's own steps"
    (results / "training_recipe_imaginary.json").unlink()
    (results / "transformer_imaginary.json").write_text(json.dumps(rows[:2]))
    assert "| fine-tuning (derived) | not measured |" in measured.render_videos(results)


def test_a_fine_tuning_is_the_trainers_default(measured: ModuleType) -> None:
    from salad_compile.training import TrainSettings

    assert (TrainSettings().steps, TrainSettings().batch) == (measured.TUNING_STEPS, measured.TUNING_BATCH)
