"""Options of the whole suite: every case, the support table, the cost of each test."""

from __future__ import annotations

import atexit
import gc
import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import settings

from salad_compile.sites import converted_models
from tests import shared
from tools import composition, composition_gpu
from tools.cost_of_tests import CostOfTests
from tools.support_table import DenseModel, Model, UnusableError, cell_of, write


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--support-table",
        action="store_true",
        help="write docs/models.md and the names in README.md from the outcomes of tests/models",
    )
    parser.addoption(
        "--composition-table", action="store_true", help="write docs/composition.md from the outcomes of its tests"
    )
    parser.addoption(
        "--composition-outcomes", type=Path, metavar="FILE", help="write down, as rows, what each test found on a GPU"
    )
    parser.addoption(
        "--update-golden", action="store_true", help="write the golden graphs of tests/passes/golden as they are now"
    )
    parser.addoption(
        "--all-cases", action="store_true", help="run every check on every model, not the slow ones on one of each kind"
    )
    parser.addoption("--cost", type=Path, metavar="FILE", help="write down what each test cost in CPU seconds")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what only `--all-cases` runs; the table needs it too."""
    if config.getoption("--support-table") or config.getoption("--all-cases"):
        return
    left_out = [item for item in items if item.get_closest_marker("all_cases")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("all_cases")]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "all_cases: slow, and one of many: runs with --all-cases or --support-table alone"
    )
    # no limit on the time of an example: a busy machine is no fault
    settings.register_profile("default", max_examples=10 if config.getoption("--all-cases") else 5, deadline=None)
    settings.load_profile("default")
    # under pytest-xdist the controller sees the reports of all workers
    is_worker = hasattr(config, "workerinput")
    if not is_worker:
        shared.open_session()
        config.add_cleanup(shared.close_session)
    if config.getoption("--support-table") and not is_worker:
        config.pluginmanager.register(_SupportTable())
    if config.getoption("--composition-table") and not is_worker:
        config.pluginmanager.register(_CompositionTable())
    if config.getoption("--composition-outcomes") and not is_worker:
        config.pluginmanager.register(_Outcomes(config.getoption("--composition-outcomes")))
    if config.getoption("--cost"):
        config.pluginmanager.register(CostOfTests(config.getoption("--cost"), writes=not is_worker))


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is here now stays; and Dynamo makes so many objects that looking for cycles among them takes long."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def pytest_unconfigure() -> None:
    gc.freeze()  # pytest looks for garbage once more, and finds that of the whole session
    atexit.register(gc.unfreeze)  # or libraries complain at exit of what they take for leaks


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
            terminal.write_line("\nwrote docs/models.md and the names in README.md")
        except UnusableError as error:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
            terminal.write_line(f"\nthe support table was not written: {error}")


class _CompositionTable:
    """Collects the outcomes of what runs beside SALAD, and writes the page when the session ends."""

    def __init__(self) -> None:
        self.outcomes: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = composition.cell_of(report.nodeid)
        if test is not None and (report.when == "call" or not report.passed):
            composition.add_outcome(self.outcomes, test, _outcome(report))

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        terminal = session.config.pluginmanager.getplugin("terminalreporter")
        try:
            composition.write(self.outcomes, f"{_versions()}, {composition.packages()}")
            terminal.write_line("\nwrote docs/composition.md")
        except UnusableError as error:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
            terminal.write_line(f"\ndocs/composition.md was not written: {error}")


class _Outcomes:
    """Writes a row after each test, so that a run that is cut off has shown something."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.rows: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            error = report.longreprtext.strip().rpartition("\n")[2][:400] if report.failed else ""
            self.rows.append(composition_gpu.outcome_row(report.nodeid, _outcome(report), error, report.duration))
            self.file.write_text(json.dumps(self.rows, indent=1))


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
    from tests.models.kinds import CONVERTED

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


@pytest.fixture
def as_if_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What earlier tests left alive are converted models that nobody knows, and then nothing is said."""
    left = {id(site) for site in converted_models.attached()}
    attached = converted_models.attached
    monkeypatch.setattr(converted_models, "attached", lambda: [site for site in attached() if id(site) not in left])


@pytest.fixture(autouse=True, scope="session")
def _guards_are_not_timed() -> Iterator[None]:
    """Dynamo empties the processor's caches to time the guards of every graph, for a log: 30 ms each.

    `profile_guard_manager` is private (torch 2.13); where it moves, this fails.
    """
    with mock.patch("torch._dynamo.guards.profile_guard_manager", return_value=0.0):
        yield


@pytest.fixture(autouse=True, scope="session")
def _spec_after_every_pass() -> Iterator[None]:
    """Every graph that any test compiles in this process is held against passes/spec.py, after every pass."""
    from salad_compile.passes.driver import watch_passes
    from tests.passes.emitted import require_spec

    with watch_passes(require_spec):
        yield
