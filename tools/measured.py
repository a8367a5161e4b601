"""The tables of measured speed, from the raw rows in benchmarks/results/ alone.

python tools/measured.py            rewrite the README's table, docs/speed.md, and the rivals in docs/kernels.md
"""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
README, RESULTS = ROOT / "README.md", ROOT / "benchmarks" / "results"
VIDEOS_BEGIN, VIDEOS_END = "<!-- videos:begin -->", "<!-- videos:end -->"
SPEED = ROOT / "docs" / "speed.md"
BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"
KERNELS = ROOT / "docs" / "kernels.md"
RIVALS_BEGIN, RIVALS_END = "<!-- rivals:begin -->", "<!-- rivals:end -->"
Row = dict[str, Any]

# What the kernel table shows of each shape, in this order: dense stands for the fastest dense kernel of the pass.
KERNEL_ROWS = {
    "1.3B-480p": (
        ("dense", "forward"),
        ("block-sparse forward", "forward"),
        ("routing + linear branch", "forward"),
        ("operator forward", "forward"),
        ("operator forward, map-then-rotate", "forward"),
        ("operator + Proj forward", "forward"),
        ("dense", "forward + backward"),
        ("block-sparse forward + backward", "forward + backward"),
        ("operator forward + backward", "forward + backward"),
    ),
    "14B-720p": (("dense", "forward"), ("operator forward", "forward"), ("operator + Proj forward", "forward")),
}


def render(results: Path = RESULTS) -> str:
    """The block of docs/speed.md, markers included, from the raw rows in `results`."""
    gpu = [part for path in _gpu_files(results, "attention") for part in (*_kernels(path), "")]
    gpu += [part for path in _gpu_files(results, "transformer") for part in (*_transformers(path), "")]
    return "\n".join([BEGIN, *gpu, *_operators(results), "", *_demo(results), END])


def _gpu_files(results: Path, script: str) -> list[Path]:
    """The rows of the newest device alone: others are in the same folder, and in docs/kernels.md."""
    files = [path for path in sorted(results.glob(f"{script}_*.json")) if path.name != "attention_cpu.json"]
    return files[-1:]


# ---------------------------------------------------------------- GPU


def _machine(row: Row) -> str:
    return (
        f"{row['device']}, torch {row['torch']}, Triton {row['triton']}, CUDA {row['cuda']}, driver {row['driver']}, "
        f"commit {row['commit'][:12]}"
    )


def _command(row: Row) -> str:
    """Without where the rows went on the lent machine."""
    return re.sub(r" --output \S+", "", row["command"])


def _milliseconds(row: Row) -> str:
    digits = 0 if row["median_ms"] >= 1000 else 1 if row["median_ms"] >= 100 else 2
    median, low, high = (f"{row[name]:,.{digits}f}" for name in ("median_ms", "p10_ms", "p90_ms"))
    return f"{median} ({low} to {high})"


def _timed(rows: list[Row]) -> list[Row]:
    return [row for row in rows if "median_ms" in row and not row["error"]]


def _missing(rows: list[Row], path: Path) -> str:
    """One line about the rows that are not timings; failures are not hidden."""
    absent = [row for row in rows if row["error"]]
    where = f"All rows: `benchmarks/results/{path.name}`."
    if not absent:
        return where
    reasons = {"not installed": 0, "left out": 0, "failed": 0}
    for row in absent:
        reasons[next((reason for reason in reasons if row["error"].startswith(reason)), "failed")] += 1
    counts = ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)
    return f"{where} Without a timing there: {counts}."


def _kernels(path: Path) -> list[str]:
    """One table of the kernels at the reference shapes."""
    rows: list[Row] = json.loads(path.read_text())
    shown = [row for case, wanted in KERNEL_ROWS.items() for row in _chosen(_timed(rows), case, wanted)]
    first = rows[0]
    shapes = {row["case"]: f"{row['tokens']:,} tokens and {row['heads']} heads of {row['head_dim']}" for row in shown}
    lines = [
        f"Kernels, `{_command(first)}`: {_machine(first)}.",
        f"{_blocks(shown)} Medians, in brackets the middle 80 %; all rows of a shape are timed in turn{_load(shown)}.",
        f"{'; '.join(f'{case} is {shape}' for case, shape in shapes.items())}.",
        f"TFLOP/s count only token pairs that are computed. {_ceilings(rows)}",
        "",
        "| shape | row | milliseconds | TFLOP/s | of the peak | best dense / row |" + _burst_heading(shown),
        "| --- | --- | --- | --- | --- | --- |" + " --- |" * bool(_burst_heading(shown)),
    ]
    for row in shown:
        rate = f"{row['tflops']:.0f} | {row['peak_share']:.0%}" if row.get("peak_share") else " | "
        name = f"{row['row']} {row['pass']}" if row["kind"] == "dense" else row["row"]
        lines.append(f"| {row['case']} | {name} | {_milliseconds(row)} | {rate} | {_ratio(row)} |{_burst(row, shown)}")
    return [*lines, "", _missing(rows, path)]


def _load(rows: list[Row]) -> str:
    return ", under load" if _burst_heading(rows) else ""


def _burst_heading(rows: list[Row]) -> str:
    """One more column, for files that have timings after a rest as well."""
    return " in a burst |" if any("burst_median_ms" in row for row in rows) else ""


def _burst(row: Row, rows: list[Row]) -> str:
    """The cell of that column: milliseconds and the ratio."""
    if not _burst_heading(rows):
        return ""
    ratio = f", {row['burst_speedup']:.2f}x" if row.get("burst_speedup") else ""
    return f" {row['burst_median_ms']:,.2f}{ratio} |" if "burst_median_ms" in row else " |"


def _blocks(rows: list[Row]) -> str:
    sparse = next((row for row in rows if row.get("query_block")), None)
    if sparse is None:
        return ""
    return (
        f"{sparse['dtype']}, blocks of {sparse['query_block']} x {sparse['key_block']}, sparsity "
        f"{sparse['sparsity']} ({sparse['measured_sparsity']:.4f} measured)."
    )


def _ceilings(rows: list[Row]) -> str:
    """What the device reached in the same run."""
    found = [row for row in _timed(rows) if row["kind"] == "ceiling"]
    texts = [f"`{row['row']}` reached {row['tflops']:.0f} TFLOP/s, the peak" for row in found if "tflops" in row][:1]
    texts += [f"a copy {row['gigabytes_per_s']:,.0f} GB/s" for row in found if "gigabytes_per_s" in row][:1]
    return f"In the same run {' and '.join(texts)}." if texts else ""


def _chosen(rows: list[Row], case: str, wanted: tuple[tuple[str, str], ...]) -> list[Row]:
    """The rows of a shape that the table shows, where they were timed: the default blocks at the main sparsity."""
    chosen = []
    for name, step in wanted:
        found = [row for row in rows if row["case"] == case and row["pass"] == step]
        if name == "dense":
            found = sorted((row for row in found if row["kind"] == "dense"), key=lambda row: row["median_ms"])
        else:
            found = [row for row in found if row["row"] == name]
        chosen += found[:1]
    return chosen


def _ratio(row: Row) -> str:
    return f"{row['speedup']:.2f}x" if row.get("speedup") else ""


def _transformers(path: Path) -> list[str]:
    """One table of whole steps; each SALAD row beside the dense row it was timed in turn with."""
    rows: list[Row] = json.loads(path.read_text())
    pairs: list[tuple[Row, Row]] = []
    dense: Row | None = None
    for row in rows:
        if row["kind"] == "dense":
            dense = row if _timed([row]) else None
        elif row["kind"] == "salad" and dense is not None and _timed([row]):
            pairs.append((dense, row))
    lines = [
        *_runs([row for _, row in pairs] or rows),
        "diffusers' WanTransformer3DModel in the widths of Wan2.1, with random weights: speed, not quality. Both sides",
        f"compiled block by block and timed in turn{_load(rows)}; medians, in brackets the middle 80 %. "
        "Memory is what a step takes",
        "beyond the weights. Denoising steps have LoRA merged. Training steps use gradient checkpointing; SALAD trains",
        "gate, projection and LoRA, dense trains nothing and only passes gradients through. Blocks are compact pieces",
        'of the token grid (`token_order="tiles"`).'
        + " Dense self-attention runs on the kernel beside its time, the fastest in this run." * bool(_load(rows)),
        "",
        "| model | step | sparsity | dense, ms | SALAD, ms | dense / SALAD | GiB, dense and SALAD |"
        + _burst_heading(rows),
        "| --- | --- | --- | --- | --- | --- | --- |" + " --- |" * bool(_burst_heading(rows)),
    ]
    for plain, row in pairs:
        about = f"{row['case']}, {row['layers']} layers, {row['tokens']:,} tokens | {row['pass']}"
        kernel = f", {plain['dense_attention']}" if plain.get("dense_attention") else ""
        times = f"{_milliseconds(plain)}{kernel} | {_milliseconds(row)} | **{_ratio(row)}**"
        memory = f"{_memory(plain)}, {_memory(row)}"
        lines.append(f"| {about} | {row['measured_sparsity']:.3f} | {times} | {memory} |{_burst(row, rows)}")
    return [*lines, "", _missing(rows, path)]


def _runs(rows: list[Row]) -> list[str]:
    """What made the rows; of several runs each with its rows."""
    runs: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        runs.setdefault((_command(row), _machine(row)), []).append(f"{row['case']} {row['pass']}")
    if len(runs) == 1:
        return [f"Whole steps, `{command}`: {machine}." for command, machine in runs]
    return [
        "Whole steps, of several runs.",
        *(f"{', '.join(made)}: `{command}`, {machine}." for (command, machine), made in runs.items()),
    ]


def _memory(row: Row) -> str:
    return f"{row['working_bytes'] / 2**30:.1f}" if row.get("working_bytes") else "-"


# ---------------------------------------------------------------- whole videos, for the README

VIDEO_STEPS, GUIDANCE = 50, 2  # forwards of the transformer: with and without the prompt in each step
VIDEO_CASES = {"1.3B-480p": "Wan2.1 1.3B, 480p", "14B-720p": "Wan2.1 14B, 720p"}
TUNING_STEPS, TUNING_BATCH = 1600, 8  # the trainer's defaults
RECIPE_CASE = "1.3B-480p"  # of benchmarks/training_recipe.py


def render_videos(results: Path = RESULTS) -> str:
    """The README's table, markers included: what the steps that were timed make of a video and of a fine-tuning."""
    files = _gpu_files(results, "transformer")
    if not files:
        return "\n".join([VIDEOS_BEGIN, "Not measured on a GPU yet.", VIDEOS_END])
    rows = _timed(json.loads(files[0].read_text()))
    found: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        found.setdefault((row["case"], row["pass"], row["kind"]), row)
    cases = [case for case in VIDEO_CASES if (case, "denoising step", "salad") in found]
    pairs = [tuple(found[case, "denoising step", kind] for kind in ("dense", "salad")) for case in cases]
    tuning = [found.get((case, "training step", "salad")) for case in cases]
    (device,) = {row["device"] for pair in pairs for row in pair}
    columns = {
        "transformer, one forward, dense (measured)": [
            f"{dense['median_ms'] / 1000:.2f} s, {dense['dense_attention']}" for dense, _ in pairs
        ],
        "the same, SALAD (measured)": [f"{salad['median_ms'] / 1000:.2f} s" for _, salad in pairs],
        "**dense / SALAD** (measured)": [f"**{_ratio(salad)}**" for _, salad in pairs],
        "a video, dense (derived)": [_video(dense) for dense, _ in pairs],
        "a video, SALAD (derived)": [_video(salad) for _, salad in pairs],
        "peak memory, dense and SALAD (measured)": [f"{_peak(dense)}, {_peak(salad)} GiB" for dense, salad in pairs],
        "fine-tuning (derived)": [_tuning(case, row, results) for case, row in zip(cases, tuning, strict=True)],
    }
    head = f"| one {device}, 81 frames | " + " | ".join(VIDEO_CASES[case] for case in cases) + " |"
    return "\n".join(
        [
            VIDEOS_BEGIN,
            head,
            "| --- |" + " --- |" * len(cases),
            *(f"| {name} | {' | '.join(cells)} |" for name, cells in columns.items()),
            "",
            f"bf16, {pairs[0][1]['sparsity']:.0%} of the key blocks left out, without compensation (it takes 2 % of a "
            "step), random weights of the real sizes.",
            "Beside the dense time: the kernel, the fastest in the same run. A video: "
            f"{VIDEO_STEPS} steps with guidance, {VIDEO_STEPS * GUIDANCE} forwards,",
            "without text encoder and VAE. Memory: weights and",
            f"one forward. Fine-tuning: {TUNING_STEPS:,} steps of {TUNING_BATCH} clips on one GPU, from a few of them.",
            f"All rows: `benchmarks/results/{files[0].name}`.",
            VIDEOS_END,
        ]
    )


def _tuning(case: str, step: Row | None, results: Path) -> str:
    """Hours: of the trainer's own steps where they were timed, else of one training step of the transformer."""
    files = _gpu_files(results, "training_recipe") if case == RECIPE_CASE else []
    runs = [
        row
        for row in (json.loads(files[0].read_text()) if files else [])
        if not (row["quick"] or row.get("memory_gib"))
    ]
    if runs:
        run = max(runs, key=lambda row: row["steps"])
        return f"{run['measured_paper_h']:.1f} h"
    return f"{step['median_ms'] * TUNING_STEPS * TUNING_BATCH / 3.6e6:.1f} h" if step else "not measured"


def _video(row: Row) -> str:
    seconds = round(row["median_ms"] * VIDEO_STEPS * GUIDANCE / 1000)
    return f"{seconds} s" if seconds < 120 else f"{seconds // 60} min {seconds % 60} s"


def _peak(row: Row) -> str:
    return f"{(row['parameter_bytes'] + row['working_bytes']) / 2**30:.1f}"


# ---------------------------------------------------------------- CPU


def _operators(results: Path) -> list[str]:
    rows: list[Row] = json.loads((results / "attention_cpu.json").read_text())
    first = rows[0]
    lines = [
        f"Operators, `{first['command']}`: {first['cpu']}, {first['threads']} threads,",
        f"torch {first['torch']}; {first['tokens']:,} tokens, {first['heads']} heads of {first['head_dim']}, "
        f"blocks of {first['block']}, measured sparsity {first['measured_sparsity']:.3f}.",
        "Medians, in brackets the middle 80 %; every round times every row in turn. PyTorch's dense bf16 attention",
        "leaves the bf16 units unused; plain bf16 matrix products, which round scores to bf16, are the best dense.",
        "",
        "| row | milliseconds | best dense / row |",
        "| --- | --- | --- |",
    ]
    for row in rows:
        spread = f"{row['median_ms']:,.0f} ({row['p10_ms']:,.0f} to {row['p90_ms']:,.0f})"
        rivals = [x for x in rows if x["baseline"] == row["baseline"] and x["row"].startswith("dense")]
        best = min(x["median_ms"] for x in rivals)
        lines.append(f"| {row['row']} | {spread} | {best / row['median_ms']:.1f}x |")
    return lines


def _demo(results: Path) -> list[str]:
    row: Row = json.loads((results / "quickstart_cpu.json").read_text())
    dense, salad = (f"{statistics.median(row[name]):.2f} s" for name in ("dense", "salad"))
    spreads = [f"{min(row[name]):.2f} to {max(row[name]):.2f}" for name in ("dense", "salad")]
    return [
        "Whole forward of a Wan-class model with two blocks,",
        f"`{row['command']}`:",
        f"{row['tokens']:,} tokens, {row['threads']} threads, torch {row['versions']['torch']}, 90 % sparsity, LoRA "
        f"unmerged. Dense under torch.compile: {dense} ({spreads[0]});",
        f"SALAD: {salad} ({spreads[1]}); **{row['speed_up']:.2f}x** (medians of {len(row['dense'])}, timed in turn).",
    ]


# ---------------------------------------------------------------- rivals

# (ours, rival, pass): what the comparison is about; the block sizes are those that each is best at.
DUELS = (
    ("ours gluon 128x64", "FlashAttention-4 block-sparse 128x128", "forward"),
    ("ours gluon 64x64", "cuDNN-frontend BSA 64x64", "forward"),
    ("ours gluon 128x64", "cuDNN-frontend BSA 128x128", "forward + backward"),
    ("ours gluon 64x64", "cuDNN-frontend BSA 64x64", "forward + backward"),
)


def render_rivals(results: Path = RESULTS) -> str:
    """The block of docs/kernels.md, markers included."""
    files = sorted(results.glob("rivals_*.json"))
    if not files:
        return "\n".join([RIVALS_BEGIN, "Not measured yet.", RIVALS_END])
    rows: list[Row] = json.loads(files[-1].read_text())
    shapes = list(dict.fromkeys(row["case"] for row in rows))
    found = {(row["row"], row["pass"], row["case"]): row for row in rows}
    names = list(dict.fromkeys((row["row"], row["pass"]) for row in rows))
    lines = [
        RIVALS_BEGIN,
        f"`{_command(rows[0])}`: {_machine(rows[0])}. Under load, medians, in brackets the middle 80 %; TFLOP/s on the",
        "computed pairs; the largest relative error to float64 of the rows that are checked.",
        "",
        "| row | " + " | ".join(f"{shape}: ms | TFLOP/s" for shape in shapes) + " | error |",
        "| --- |" + " --- | --- |" * len(shapes) + " --- |",
    ]
    for name, step in sorted(names, key=lambda pair: pair[1] != "forward"):
        alike = [found.get((name, step, shape)) for shape in shapes]
        errors = [row["relative_error"] for row in alike if row and row.get("relative_error") is not None]
        row_name = name if name.startswith("matmul") else f"{name} {step}"
        row_name = f"**{row_name}**" if name.startswith("ours gluon") else row_name
        cells = " | ".join(_rival(row) for row in alike)
        lines.append(f"| {row_name} | {cells} | {f'{max(errors):.0e}' if errors else ''} |")
    lines += ["", *(line for line in (_duels(found, shape) for shape in shapes) if line)]
    reasons = {f"{row['row']} {row['pass']}: {row['error'][:160]}" for row in rows if row["error"]}
    lines += ["", "Without a timing:", "", *(f"- {reason}" for reason in sorted(reasons))] if reasons else []
    return "\n".join([*lines, RIVALS_END])


def _rival(row: Row | None) -> str:
    if row is None or not _timed([row]):
        return "- | -"
    return f"{_milliseconds(row)} | {row['tflops']:.0f}"


def _duels(found: dict[tuple[str, str, str], Row], shape: str) -> str:
    """Rates of ours over the rivals that matter."""
    parts = []
    for ours, rival, step in DUELS:
        ratio = (found.get((ours, step, shape)) or {}).get("rate_over", {}).get(rival)
        if ratio:
            parts.append(f"{ours} {step} **{ratio:.2f}x** {rival}")
    return f"Rates, {shape}: {'; '.join(parts)}." if parts else ""


def _replace(path: Path, begin: str, end: str, block: str) -> None:
    text = path.read_text()
    path.write_text(text[: text.index(begin)] + block + text[text.index(end) + len(end) :])


def main() -> None:
    """Rewrite the blocks of the README, of docs/speed.md and of docs/kernels.md."""
    _replace(README, VIDEOS_BEGIN, VIDEOS_END, render_videos())
    _replace(SPEED, BEGIN, END, render())
    _replace(KERNELS, RIVALS_BEGIN, RIVALS_END, render_rivals())


if __name__ == "__main__":
    main()
