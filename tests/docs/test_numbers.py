"""Numbers in sentences and in tables by hand are those of the rows: of benchmarks/results, or of tables made from them.

Tables that are generated have tests of their own (tests/test_measured.py, tests/test_what_to_pick.py, tests/examples).
"""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.docs.test_snippets import ROOT

DOCS, RESULTS = ROOT / "docs", ROOT / "benchmarks" / "results"
GENERATED = re.compile(r"<!-- (\w+):begin -->.*?<!-- \1:end -->", re.DOTALL)


def text_of(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def prose_of(page: str) -> str:
    """A page without its generated blocks, each run of blanks as one."""
    return " ".join(GENERATED.sub("", text_of(page)).split())


def rows(name: str) -> list[dict[str, Any]]:
    loaded: list[dict[str, Any]] = json.loads((RESULTS / name).read_text())
    return loaded


def medians(name: str) -> dict[tuple[str, str, str], float]:
    """(shape, row, pass) -> milliseconds."""
    return {(r["case"], r["row"], r["pass"]): r["median_ms"] for r in rows(name) if r.get("median_ms")}


def shares() -> set[str]:
    """Shares of the gap as the generated tables of the evidence have them: "68.0"."""
    tables = "".join(match[0] for match in GENERATED.finditer(text_of("evidence.md")))
    return set(re.findall(r"\| (-?\d+\.\d)%", tables))


@pytest.mark.parametrize("page", ["evidence.md", "method.md"])
def test_shares_of_the_gap_are_measured_ones(page: str) -> None:
    found = re.findall(r"(?<![\d.])(\d+\.\d) %(?! of a step)", prose_of(page))
    assert found
    assert [share for share in found if share not in shares()] == []


def test_what_the_variants_cost() -> None:
    page = text_of("method.md")
    known = {
        f"{r['median_ms']:.1f} ({r['p10_ms']:.1f} to {r['p90_ms']:.1f})"
        for r in rows("variants_h200.json")
        if r.get("median_ms")
    }
    told = re.findall(r"\| (\d+\.\d \(\d+\.\d to \d+\.\d\)) \|", page)
    assert len(told) >= 4
    assert [each for each in told if each not in known] == []
    auto, direct = (float(each.split()[0]) for each in told[:2])
    said = re.search(r"It costs (\d) % of a denoising step", " ".join(page.split()))
    assert said
    assert abs(int(said[1]) - 100 * (auto - direct) / auto) < 1
    assert f"| {said[1]} % of a step; " in text_of("what_to_pick.md")


def test_what_the_speed_is_compared_with() -> None:
    found = medians("rivals_h200.json")
    ratios = [
        found[shape, "dense cuDNN", step] / ms
        for (shape, name, step), ms in found.items()
        if re.fullmatch(r"dense FlashAttention-\d", name)
    ]
    said = re.search(r"which the FlashAttentions beat by (\d+) to (\d+) %", prose_of("speed.md"))
    assert said
    assert [int(each) for each in said.groups()] == [round(100 * (each - 1)) for each in (min(ratios), max(ratios))]
    sparse = ("FlashAttention-4 block-sparse 128x128", "cuDNN-frontend BSA 128x128")
    ratios = [
        1 / row["rate_over"][name]
        for row in rows("rivals_h200.json")
        if (row["row"], row["pass"]) == ("ours gluon 128x64", "forward + backward")
        for name in sparse
    ]
    said = re.search(r"block-sparse kernels are (\d+) to (\d+) % faster than ours", prose_of("speed.md"))
    assert said
    assert [int(each) for each in said.groups()] == [round(100 * (each - 1)) for each in (min(ratios), max(ratios))]


def test_what_routing_and_the_linear_branch_take() -> None:
    found = medians("attention_h200.json")
    told = re.search(
        r"take ([\d.]+) of the operator's ([\d.]+) ms at 32,760 tokens and 12 heads on an H200, "
        r"([\d.]+) of ([\d.]+) ms at",
        prose_of("limitations.md"),
    )
    assert told
    measured = [
        found[shape, row, "forward"]
        for shape in ("1.3B-480p", "1.3B-720p")
        for row in ("routing + linear branch", "operator forward")
    ]
    assert list(told.groups()) == [f"{ms:.2f}" for ms in measured]


def test_what_to_pick_says_of_quality() -> None:
    small, _, _ = text_of("evidence.md").partition("<!-- experiment:end -->")
    closed = dict(re.findall(r"^\| `([\w-]+)` .* \| (-?[\d.]+)% \| -?[\d.]+% \|", small, re.MULTILINE))
    assert "at 80 % more of the gap closes than at 90 % with four times the steps" in prose_of("what_to_pick.md")
    assert float(closed["sparsity-80"]) > float(closed["salad-long"])
    assert "each closes more of the gap than the linear branch does" in prose_of("what_to_pick.md")
    of_the_branch = float(closed["salad"]) - float(closed["sparse-lora"])
    for better, worse in (("tail-lora", "sparse-lora"), ("tail-error", "tail"), ("salad", "blocks-128")):
        assert float(closed[better]) - float(closed[worse]) > of_the_branch > 0, better


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_the_seconds_of_the_strip(page: str) -> None:
    row = json.loads((RESULTS / "sample_cpu.json").read_text())
    text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
    told = re.search(
        r"with dense attention \(([\d.]+) s\); with 90 % of it left out \(([\d.]+) s\); and fine-tuned as SALAD "
        r"\(arXiv 2601.16515, ([\d.]+) s\)",
        text,
    )
    assert told
    assert list(told.groups()) == [f"{seconds:.1f}" for seconds in row["cpu_seconds"].values()]
    assert row["threads"] == 1
    assert "Seconds of one thread of a CPU" in text


def test_what_plan_advises_is_what_the_rows_say() -> None:
    from salad_compile.discovery.advice import GAP_CLOSED, MEASURED_TOKENS

    _, _, real = text_of("evidence.md").partition("<!-- real:begin -->")
    assert f"{MEASURED_TOKENS:,} tokens" in real
    closed = dict(re.findall(r"^\| `([\w-]+)` .*?\| [\d.]+ \| [\d.]+ \| (-?[\d.]+)% \|", real, re.MULTILINE))
    assert {name: round(float(closed[name])) for name in GAP_CLOSED} == GAP_CLOSED
    for page in ("what_to_pick.md", "method.md"):
        for name in ("tail-only", "tail-only-64"):
            assert f"{GAP_CLOSED[name]} %" in prose_of(page)
