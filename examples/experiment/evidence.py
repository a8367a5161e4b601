"""The tables of docs/evidence.md, written between their markers from the raw rows alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from arms import ARMS, Arm
from predictions import CLAIMS, PREDICTIONS
from presets import FULL
from results import RESULTS, ROOT, Row, read

PAGE = ROOT / "docs" / "evidence.md"
BEGIN, END = "<!-- experiment:begin -->", "<!-- experiment:end -->"
AIM = 0.8  # of the gap between sparse-only and dense
COLUMNS = (
    "| arm | what it is | seeds | held-out loss | / dense | gap closed | of dense-tuned | PSNR, dB | SSIM |",
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
)


class MissingRowsError(ValueError):
    """Rows that the tables need are missing."""


@dataclass(frozen=True)
class Summary:
    """One arm over its seeds. spread: largest minus smallest loss, None with one seed."""

    loss: float
    spread: float | None
    seeds: int
    psnr: float
    ssim: float


def summarise(rows: Iterable[Row]) -> dict[str, Summary]:
    """Arm -> its mean over the seeds that were run."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["arm"], []).append(row)
    return {arm: _summary(own) for arm, own in found.items()}


def _summary(rows: Sequence[Row]) -> Summary:
    losses = [row["held_out_loss"] for row in rows]
    psnr, ssim = (statistics.fmean(row[name] for row in rows) for name in ("psnr", "ssim"))
    return Summary(
        statistics.fmean(losses), max(losses) - min(losses) if len(losses) > 1 else None, len(rows), psnr, ssim
    )


def render(rows: Sequence[Row], rate: float = FULL.tune.rate) -> str:
    """Everything between the markers, markers included.

    Args:
        rows: of one device. rate: the learning rate of the tables; other rows are those of the sweep.

    Raises:
        MissingRowsError: dense, dense-tuned or sparse-only is missing; everything is compared with these.
    """
    main = [row for row in rows if row["settings"]["tune"]["rate"] == rate]
    found = summarise(main)
    lacking = [name for name in ("dense", "dense-tuned", "sparse-only") if name not in found]
    if lacking:
        raise MissingRowsError(f"no rows of {', '.join(lacking)} at learning rate {rate}: run them first.")
    lines = [BEGIN, *_where(main), ""]
    groups = [
        _table(group, [arm for arm in ARMS if arm.group == group and arm.name in found], found)
        for group in dict.fromkeys(arm.group for arm in ARMS)
    ]
    lines += [*groups[0], *_claims(found), *_missing(found)]
    for part in (*groups[1:], _predictions(found), _levels(main, found), _rates(rows)):
        lines += fold(part)
    return "\n".join([*lines, END])


def fold(lines: list[str]) -> list[str]:
    """A part of the page that opens at a click on its first line, `**title**` and what stands behind it."""
    if not lines:
        return []
    title = lines[0].replace("**", "")
    return [f'<details markdown="1"><summary>{title}</summary>', *lines[1:], "</details>", ""]


def _where(rows: Sequence[Row]) -> list[str]:
    first = rows[-1]
    tune, rank = first["settings"]["tune"], first["settings"]["rank"]
    commits = " and ".join(dict.fromkeys(row["commit"] for row in rows))
    machine = f"{first['device']}, torch {first['torch']}, Triton {first['triton']}, commit {commits}"
    tuning = f"{tune['clips']:,} clips, {FULL.tune.steps} steps of {tune['batch']}, AdamW at {tune['rate']}"
    return [
        f"{machine}, {first['date']}.",
        f"Fine-tuning: {tuning}, LoRA of rank {rank}.",
        f"Held-out loss: mean over the same {FULL.held_out} clips, noises and noise levels for every arm; after ± half",
        "the spread of the seeds. Gap closed: (sparse-only - arm) / (sparse-only - dense); beside it with dense-tuned",
        "in the place of dense. PSNR and SSIM: samples against the dense model's from the same noise,",
        f"{FULL.samples} clips, {FULL.sampler_steps} Euler steps.",
    ]


def gap_closed(loss: float, found: dict[str, Summary], reference: str = "dense") -> float:
    """(L_sparse_only - loss) / (L_sparse_only - L_reference)."""
    top = found["sparse-only"].loss
    return (top - loss) / (top - found[reference].loss)


def _table(group: str, arms: Sequence[Arm], found: dict[str, Summary]) -> list[str]:
    if not arms:
        return []
    lines = [f"**{group}**", "", *COLUMNS]
    for arm in arms:
        own = found[arm.name]
        spread = "" if own.spread is None else f" ± {own.spread / 2:.5f}"
        shares = [f"{gap_closed(own.loss, found, reference):.1%}" for reference in ("dense", "dense-tuned")]
        alike = ["-", "-"] if arm.name == "dense" else [f"{own.psnr:.1f}", f"{own.ssim:.3f}"]
        cells = [
            f"`{arm.name}`",
            arm.about,
            str(own.seeds),
            f"{own.loss:.5f}{spread}",
            f"{own.loss / found['dense'].loss:.3f}",
            *shares,
            *alike,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _missing(found: dict[str, Summary]) -> list[str]:
    absent = [arm.name for arm in ARMS if arm.name not in found]
    return [f"Not run: {', '.join(absent)}.", ""] if absent else []


def _predictions(found: dict[str, Summary]) -> list[str]:
    lines = ["**Predicted and measured: held-out loss / dense**", ""]
    lines += ["| arm | predicted | why | measured | |", "| --- | --- | --- | --- | --- |"]
    hits = 0
    known = [p for p in PREDICTIONS if p.arm in found]
    for prediction in known:
        ratio = found[prediction.arm].loss / found["dense"].loss
        hit = prediction.low <= round(ratio, 3) <= prediction.high
        hits += hit
        expected = f"{prediction.low:.2f} to {prediction.high:.2f}"
        verdict = "as predicted" if hit else "**no**"
        lines.append(f"| `{prediction.arm}` | {expected} | {prediction.why} | {ratio:.3f} | {verdict} |")
    return [*lines, "", f"{hits} of {len(known)} as predicted.", ""]


def _claims(found: dict[str, Summary]) -> list[str]:
    if not {"salad", "sparse-lora"} <= set(found):
        return []
    salad, lora = found["salad"], found["sparse-lora"]
    closed, better = gap_closed(salad.loss, found), lora.loss - salad.loss
    noise = max(salad.spread or 0.0, lora.spread or 0.0)
    verdicts = (
        f"SALAD closes {closed:.1%} of the gap; {AIM:.0%} is {'reached' if closed >= AIM else 'not reached'}.",
        f"SALAD is {better:.5f} below sparse-lora, {better / lora.loss:.1%} of its loss; the larger spread of the two "
        f"is {noise:.5f}: {'more' if better > noise else 'not more'} than the spread.",
    )
    lines: list[str] = []
    for number, (claim, verdict) in enumerate(zip(CLAIMS, verdicts, strict=True), start=1):
        lines += [f"{number}. Predicted: {claim} Measured: {verdict}"]
    return [*lines, ""]


def _levels(rows: Sequence[Row], found: dict[str, Summary]) -> list[str]:
    """The loss at each range of noise levels: means over the seeds."""
    arms = [
        name
        for name in ("dense", "sparse-only", "sparse-lora", "salad", "rope-after-map", "linear-only")
        if name in found
    ]
    lines = ["**Held-out loss by noise level**, 0 is the clip and 1 is noise", ""]
    lines += ["| arm | 0 to 0.2 | to 0.4 | to 0.6 | to 0.8 | to 1 |", "| --- | --- | --- | --- | --- | --- |"]
    for name in arms:
        columns = zip(*(row["held_out_by_level"] for row in rows if row["arm"] == name), strict=True)
        lines.append(f"| `{name}` | {' | '.join(f'{statistics.fmean(column):.4f}' for column in columns)} |")
    return [*lines, ""]


def _rates(rows: Sequence[Row]) -> list[str]:
    """The sweep by which the learning rate was chosen: arms with rows at several rates, seed 0."""
    losses: dict[str, dict[float, float]] = {}
    for row in rows:
        if row["seed"] == 0 and row["settings"]["trained"]:
            losses.setdefault(row["arm"], {})[row["settings"]["tune"]["rate"]] = row["held_out_loss"]
    swept = {arm: own for arm, own in losses.items() if len(own) > 1}
    if not swept:
        return []
    rates = sorted({rate for own in swept.values() for rate in own})
    lines = ["**Learning rate**, held-out loss of seed 0", ""]
    lines += [f"| arm | {' | '.join(f'{rate:g}' for rate in rates)} |", "| --- |" + " --- |" * len(rates)]
    for arm, own in swept.items():
        lines.append(f"| `{arm}` | {' | '.join(f'{own[rate]:.5f}' if rate in own else '-' for rate in rates)} |")
    return [*lines, ""]


def newest_rows() -> list[Row]:
    """The rows of the device whose file has most rows.

    Raises:
        MissingRowsError: there is none.
    """
    files = [rows for path in sorted(RESULTS.glob("experiment_*.jsonl")) if (rows := read(path))]
    if not files:
        raise MissingRowsError(f"no {RESULTS.relative_to(ROOT)}/experiment_*.jsonl: run the arms first.")
    return max(files, key=len)


def write(page: Path = PAGE, rows: Sequence[Row] | None = None) -> None:
    """Rewrite the text between the markers of the page.

    Raises:
        MissingRowsError: see :func:`render`. ValueError: the page has no markers.
    """
    text = page.read_text()
    if BEGIN not in text or END not in text:
        raise ValueError(f"{page} has no {BEGIN} ... {END}: put the markers where the tables belong.")
    start, end = text.index(BEGIN), text.index(END) + len(END)
    page.write_text(text[:start] + render(newest_rows() if rows is None else rows) + text[end:])
