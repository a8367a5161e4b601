"""`--support-table`: write docs/models.md and the block of README.md from the outcomes of tests/models."""

from __future__ import annotations

import platform
from typing import Any

import pytest
import torch
from hypothesis import settings

from tools.support_table import DenseModel, Model, UnusableError, cell_of, write


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--support-table",
        action="store_true",
        help="write docs/models.md and the table in README.md from the outcomes of tests/models",
    )
    parser.addoption(
        "--all-cases", action="store_true", help="run every check on every model, not the slow ones on one of each kind"
    )


# Ways in which a model can be built that matter to activation checkpointing and to a second resolution: attention
# modules and inline attention, one stream, joint streams on either side, two streams, masks, grouped heads, a call for
# each sample, graphs that break.
KINDS = frozenset(
    {
        "handwritten_fused",
        "handwritten_inline",
        "handwritten_multihead",
        "Wan",
        "Latte",
        "CogVideoX",
        "HunyuanVideo",
        "EasyAnimate",
        "Mochi",
        "Cosmos3Omni",
        "WanAnimate2",
    }
)

# One for each way of rotating: in place, complex numbers, views, matrices, halves, a part of the tokens, two streams.
ROTATIONS = frozenset(
    {
        "Wan",
        "AnyFlow",
        "LTX2Video",
        "Kandinsky5",
        "ConsisID",
        "HunyuanVideo",
        "MotifVideo",
        "Mochi",
        "Cosmos3Omni",
        "handwritten_rearrange",
    }
)
# Inductor takes up to a minute for a case; GPU runs and the compile matrix go through it as well.
PER_BLOCK_INDUCTOR = frozenset({"Wan", "handwritten_inline", "CogVideoX"})
# Ten seconds each: a plain model, text in one stream, a key prefix, a call for each sample, no attention module.
RESOLUTIONS = frozenset({"Wan", "CogVideoX", "Cosmos3Omni", "Mochi", "handwritten_inline"})
VARIANT_PAIRS = frozenset({"CogVideoX-windows", "Cosmos3Omni-v2", "EasyAnimate-adjustable_windows"})


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What takes long runs on fewer models, unless the table is written or every case is asked for.

    Second cases of one model class compile nothing, and the rest of what compiles has one case for each kind of model.
    """
    if config.getoption("--support-table") or config.getoption("--all-cases"):
        return
    from tests.models.expectations import VARIANTS

    def left(item: pytest.Item) -> bool:
        case = _case_of(item)
        if "models/" not in item.nodeid.partition("::")[0]:
            return False
        if "either_placement_compiles" in item.nodeid:
            return not case.startswith("Wan-")
        if "models/test_position.py" in item.nodeid:
            return case not in KINDS | ROTATIONS
        if "test_variants.py::test_compiled" in item.nodeid:
            return not case.startswith("Wan-") and case not in VARIANT_PAIRS
        if "per_block_through_inductor" in item.nodeid:
            return case not in PER_BLOCK_INDUCTOR
        if "whole_model_through_inductor" in item.nodeid:
            return case != "Wan"
        if "equals_compiled[" in item.nodeid:
            return case not in ROTATIONS
        if "equals_compiled_per_block[" in item.nodeid:
            return case not in KINDS | ROTATIONS
        if "second_resolution" in item.nodeid:
            return case not in RESOLUTIONS
        if "test_zoo.py" not in item.nodeid:
            return False
        return (_compiles(item) and case in VARIANTS) or (_is_slow(item) and case not in KINDS)

    left_out = [item for item in items if left(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def _compiles(item: pytest.Item) -> bool:
    return any(part in item.nodeid for part in ("compile", "checkpointing"))


def _is_slow(item: pytest.Item) -> bool:
    return "checkpointing" in item.nodeid


def _case_of(item: pytest.Item) -> str:
    return item.nodeid.rpartition("[")[2].removesuffix("]")


def pytest_configure(config: pytest.Config) -> None:
    settings.register_profile("default", max_examples=10 if config.getoption("--all-cases") else 5)
    settings.load_profile("default")
    # under pytest-xdist the controller sees the reports of all workers
    if config.getoption("--support-table") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_SupportTable())


class _SupportTable:
    """Collects outcomes, and writes the tables when the session ends."""

    def __init__(self) -> None:
        self.outcomes: dict[tuple[str, str], str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        cell = cell_of(report.nodeid)
        if cell is not None and (report.when == "call" or not report.passed):
            self.outcomes[cell] = _outcome(report)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        terminal = session.config.pluginmanager.getplugin("terminalreporter")
        try:
            write(_models(), self.outcomes, _versions(), _dense())
            terminal.write_line("\nwrote docs/models.md and the table in README.md")
        except UnusableError as error:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
            terminal.write_line(f"\nthe support table was not written: {error}")


def _outcome(report: pytest.TestReport) -> str:
    """`yes`, `no (reason)` for a skip or an expected failure, `no` for a failure."""
    if report.passed:
        return "yes"
    if not report.skipped:
        return "no"
    reason = getattr(report, "wasxfail", "") or (
        report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    )
    return f"no ({reason.removeprefix('reason: ').removeprefix('Skipped: ')})"


def _models() -> list[Model]:
    from tests.models.expectations import converted_sites
    from tests.models.test_zoo import CONVERTED

    return [Model(case.name, _class_of(case), converted_sites(case), case.note) for case in CONVERTED.values()]


def _dense() -> list[DenseModel]:
    from tests.models.expectations import DENSE
    from tests.models.registry import ALL_CASES, WITHOUT_CASE

    cases = [DenseModel(name, _class_of(ALL_CASES[name]), dense.reason, True) for name, dense in DENSE.items()]
    return cases + [DenseModel("-", f"`{name}` (diffusers)", reason, False) for name, reason in WITHOUT_CASE.items()]


def _class_of(case: Any) -> str:
    cls = type(case.build())
    return f"`{cls.__name__}` ({cls.__module__.partition('.')[0]})"


def _versions() -> str:
    import diffusers
    import torch

    return f"Python {platform.python_version()}, torch {torch.__version__} and diffusers {diffusers.__version__}"


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Toy models draw their weights from the global generator: the same in every run."""
    torch.manual_seed(0)
