"""`--wild-table`: write the part of docs/models.md on other projects' models from the outcomes."""

from __future__ import annotations

import platform
from importlib.metadata import distributions

import pytest
import torch

from tests.wild import tables
from tests.wild.rule import DISTRIBUTIONS, PACKAGES
from tests.wild.stand_ins import SITE
from tools.wild_table import Foreign, cell_of, write


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--wild-table", action="store_true", help="write the part of docs/models.md on other projects' models"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--wild-table") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_WildTable())


class _WildTable:
    """Collects outcomes, and writes the tables when the session ends without a failure."""

    def __init__(self) -> None:
        self.outcomes: dict[tuple[str, str], str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        cell = cell_of(report.nodeid)
        if cell is not None and (report.when == "call" or not report.passed):
            reason = getattr(report, "wasxfail", "").removeprefix("reason: ")
            self.outcomes[cell] = f"no ({reason})" if reason else "yes" if report.passed else "no"

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        terminal = session.config.pluginmanager.getplugin("terminalreporter")
        if session.testsfailed or "no" in self.outcomes.values():
            terminal.write_line("\nthe table was not written: not all checks passed")
            return
        versions = {each.name.replace("-", "_"): each.version for each in distributions(path=[str(SITE)])}
        projects = {
            f"{name} {versions[DISTRIBUTIONS.get(name, name)]}": _classes(name, self.outcomes) for name in PACKAGES
        }
        write(
            {project: classes for project, classes in projects.items() if classes},
            f"Python {platform.python_version()} and torch {torch.__version__}",
        )
        terminal.write_line("\nwrote the part of docs/models.md on other projects' models")


def _classes(package: str, outcomes: dict[tuple[str, str], str]) -> list[Foreign]:
    """Entries first, then what could not be tried; parts and models of images are neither."""
    found = []
    for name in tables.names():
        if name.partition(".")[0] == package:
            case = tables.case(name)
            checks = {check: said for (of, check), said in outcomes.items() if of == name}
            found.append(Foreign(name, case.sites, case.refused, "", checks))
    for name, reason in tables.not_tried().items():
        if name.partition(".")[0] == package:
            found.append(Foreign(name, (), "", reason, {}))
    return found
