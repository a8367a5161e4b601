"""The section of docs/evidence.md on real videos, written between its markers from the raw rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from arms import Arm
from evidence import PAGE, fold
from predictions import REAL_PREDICTIONS
from real_arms import LONGER, REAL_ARMS, TUNED, UNTRAINED
from results import RESULTS, Row, read

BEGIN, END = "<!-- real:begin -->", "<!-- real:end -->"
NOTHING = "Not run yet."
AIM = 0.85  # of the gap between sparse-only and dense, after fine-tuning


def newest_rows() -> list[Row]:
    """The rows of the device whose file has most; none if there is no file."""
    return max((read(path) for path in sorted(RESULTS.glob("real_*.jsonl"))), key=len, default=[])


def render(rows: Sequence[Row]) -> str:
    """Everything between the markers, markers included; says so if the two rows are missing that others need."""
    found = {row["arm"]: row for row in rows if row["seed"] == 0}
    if not {"dense", "sparse-only"} <= set(found):
        return f"{BEGIN}\n{NOTHING}\n{END}"
    lines = [BEGIN, *_where(found), ""]
    for group in (UNTRAINED, TUNED, LONGER):
        lines += _table(group, [arm for arm in REAL_ARMS if arm.group == group and arm.name in found], found)
    absent = [arm.name for arm in REAL_ARMS if arm.name not in found]
    lines += [f"Not run: {', '.join(absent)}.", ""] if absent else []
    return "\n".join([*lines, *fold(_predictions(found)), *fold(_levels(found)), *_verdict(found), END])


def gap_closed(name: str, found: dict[str, Row], column: str = "held_out_loss") -> float:
    """(L_sparse_only - L) / (L_sparse_only - L_dense)."""
    top, dense = found["sparse-only"][column], found["dense"][column]
    return float((top - found[name][column]) / (top - dense))


def _where(found: dict[str, Row]) -> list[str]:
    dense = found["dense"]
    size = dense["settings"]["model"]
    commits = " and ".join(dict.fromkeys(row["commit"] for row in found.values()))
    short = {arm.name for arm in REAL_ARMS if arm.trained}
    tuned = [row for name, row in found.items() if name in short]
    lines = [
        f"{dense['device']}, torch {dense['torch']}, Triton {dense['triton']}, commit {commits}, {dense['date']}.",
        f"{dense['parameters'] / 1e6:.1f} million parameters, {size['layers']} layers, {size['heads']} heads of "
        f"{size['width'] // size['heads']}, {dense['tokens']:,} tokens, sparsity 0.9.",
    ]
    if tuned:
        tune = tuned[0]["settings"]["tune"]
        counts = sorted({row["settings"]["tune"]["steps"] for row in tuned})
        steps = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        lines += [
            f"Fine-tuning with `salad_compile.training`: {steps} steps of {tune['batch']} clips, AdamW at "
            f"{tune['rate']}, LoRA of rank {tuned[0]['settings']['rank']}, running mean of the parameters. One seed."
        ]
    return lines


_COLUMNS = (
    "| arm | what it is | held-out loss | / dense | gap closed | later | other films | PSNR, dB | SSIM "
    "| frame differences | steps |",
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
)


def _table(group: str, arms: Sequence[Arm], found: dict[str, Row]) -> list[str]:
    if not arms:
        return []
    lines = [f"**{group}**", "", *_COLUMNS]
    for arm in arms:
        row, same = found[arm.name], arm.name == "dense"
        columns = ("held_out_loss", "loss_later", "loss_other")
        shares = [f"{gap_closed(arm.name, found, column):.1%}" for column in columns]
        alike = [f"{row['psnr_restored']:.1f}", f"{row['ssim_restored']:.3f}", f"{row['difference_restored']:.4f}"]
        cells = [
            f"`{arm.name}`",
            arm.about,
            f"{row['held_out_loss']:.5f}",
            f"{row['held_out_loss'] / found['dense']['held_out_loss']:.3f}",
            *shares,
            *(["-"] * 3 if same else alike),
            str(row["settings"]["tune"]["steps"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _predictions(found: dict[str, Row]) -> list[str]:
    lines = ["**Predicted and measured**: of sparse-only the loss / dense, of the others the gap closed", ""]
    lines += ["| arm | predicted | why | measured | |", "| --- | --- | --- | --- | --- |"]
    known = [prediction for prediction in REAL_PREDICTIONS if prediction.arm in found]
    hits = 0
    for prediction in known:
        ratio = found[prediction.arm]["held_out_loss"] / found["dense"]["held_out_loss"]
        measured = ratio if prediction.arm == "sparse-only" else gap_closed(prediction.arm, found)
        hit = prediction.low <= round(measured, 3) <= prediction.high
        hits += hit
        verdict = "as predicted" if hit else "**no**"
        expected = f"{prediction.low:.2f} to {prediction.high:.2f}"
        lines.append(f"| `{prediction.arm}` | {expected} | {prediction.why} | {measured:.3f} | {verdict} |")
    return [*lines, "", f"{hits} of {len(known)} as predicted.", ""]


def _levels(found: dict[str, Row]) -> list[str]:
    lines = ["**Held-out loss by noise level**, 0 is the clip and 1 is noise", ""]
    lines += ["| arm | 0 to 0.2 | to 0.4 | to 0.6 | to 0.8 | to 1 |", "| --- | --- | --- | --- | --- | --- |"]
    for arm in REAL_ARMS:
        if arm.name in found:
            columns = " | ".join(f"{loss:.4f}" for loss in found[arm.name]["held_out_by_level"])
            lines.append(f"| `{arm.name}` | {columns} |")
    return [*lines, ""]


def _verdict(found: dict[str, Row]) -> list[str]:
    """Whether the aim is reached by the best fine-tuned arm."""
    tuned = [arm.name for arm in REAL_ARMS if (arm.trained or arm.of) and arm.name in found]
    if not tuned:
        return []
    shares = {name: gap_closed(name, found) for name in tuned}
    best = max(shares, key=lambda name: shares[name])
    said = "reached" if shares[best] >= AIM else "not reached"
    return [f"The most that a fine-tuned arm closes is {shares[best]:.1%} (`{best}`): {AIM:.0%} is {said}."]


def write(page: Path = PAGE, rows: Sequence[Row] | None = None) -> None:
    """Rewrite the text between the markers of the page.

    Raises:
        ValueError: the page has no markers.
    """
    text = page.read_text()
    if BEGIN not in text or END not in text:
        raise ValueError(f"{page} has no {BEGIN} ... {END}: put the markers where the section belongs.")
    start, end = text.index(BEGIN), text.index(END) + len(END)
    page.write_text(text[:start] + render(newest_rows() if rows is None else rows) + text[end:])
