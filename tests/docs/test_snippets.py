"""Every python and bash block of the documents runs, unless a comment before it says why not."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from salad_compile.calls.adapters import _ADAPTERS
from salad_compile.command_line import build_parser, main
from tests.docs import world
from tests.docs.blocks import Block, Command, blocks_of, commands_of

ROOT = Path(__file__).resolve().parents[2]
# docs/command_line.md is written from the parsers; the other pages have no snippets to run
PAGES = [
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("index", "getting_started", "how_it_works", "settings")),
    *(ROOT / "docs" / f"{name}.md" for name in ("fine_tuning", "inference", "formats", "troubleshooting")),
]
SETTINGS = ROOT / "docs" / "settings.md"
MOST_NOT_RUN = 4


@pytest.fixture(scope="session")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("documents") / "world"
    directory.mkdir()
    world.build(directory)
    return directory


@pytest.fixture
def _in_small_world(small_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A working directory with everything in it, small defaults, a process group of this process alone."""
    shutil.copytree(small_world, tmp_path / "world")
    monkeypatch.chdir(tmp_path / "world")
    world.small_defaults(monkeypatch)
    adapters = dict(_ADAPTERS)
    torch._dynamo.reset()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
    torch._dynamo.reset()
    _ADAPTERS.clear()
    _ADAPTERS.update(adapters)


# with a GPU, accelerate and FSDP2 would use it, and the process group here is one of CPUs
@pytest.mark.skipif(torch.cuda.is_available(), reason="other tests do on a GPU what snippets do")
@pytest.mark.usefixtures("_in_small_world")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_snippets(page: Path) -> None:
    known = world.names()
    for made in world.MADE.get(page.stem, ()):
        shutil.rmtree(made)
    for block in blocks_of(page):
        if block.not_run is not None:
            continue
        if block.language == "python":
            run_python(block, known)
        elif block.language == "bash" or (block.language == "" and page.name == "README.md"):
            for command in commands_of(block):
                run_command(block, command)


def run_python(block: Block, known: dict[str, Any]) -> None:
    for fragment, made in world.FRESH.items():
        if block.page.name == SETTINGS.name and fragment in block.code:
            known.update(made())
    # the traceback of a failure shows the page and its line
    code = compile("\n" * (block.line - 1) + block.code, str(block.page), "exec")
    exec(code, known)


def run_command(block: Block, command: Command) -> None:
    program, *words = command.words
    assert program in CHECKS, f"{block}: CHECKS has no {program!r}"
    try:
        CHECKS[program](words, command.code)
    except AssertionError as error:
        raise AssertionError(f"{block}: {' '.join(command.words)}: {error}") from error


# --- commands ---------------------------------------------------------------------------------------------------------


def ours(words: list[str], code: int) -> None:
    """salad-compile: run in this process, unless it starts other processes, where nothing would be small."""
    parser = build_parser(words[0])
    parsed = parser.parse_args([word for word in words if word not in ("--json", "--debug")])
    if getattr(parsed, "processes", 1) == 1 and not getattr(parsed, "push_to_hub", None):
        assert main(words) == code


def make(words: list[str], code: int) -> None:
    """Not run, because they run the tests. The target exists."""
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert words[0] in targets, f"the Makefile has no target {words[0]}"


def pip(words: list[str], code: int) -> None:
    """Not run: it would change this environment. The extras exist."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extras in re.findall(r"\[(.+?)\]", " ".join(words)):
        for extra in extras.split(","):
            assert extra in project["optional-dependencies"], f"there is no extra {extra}"


def hub(words: list[str], code: int) -> None:
    """Not run: a download."""
    assert words[0] == "download"


def python(words: list[str], code: int) -> None:
    """Not run: each has tests of its own. The file or the module exists."""
    if words[0] == "-m":
        assert importlib.util.find_spec(words[1]) is not None, f"no module {words[1]}"
    else:
        assert (ROOT / words[0]).is_file(), f"no file {words[0]}"


def accelerate(words: list[str], code: int) -> None:
    """Not run, because it starts processes. Its own arguments and those of the script are parsed."""
    from accelerate.commands.launch import launch_command_parser

    assert words[0] == "launch"
    check_script(launch_command_parser().parse_args(words[1:]))


def torchrun(words: list[str], code: int) -> None:
    """As :func:`accelerate`."""
    from torch.distributed.run import get_args_parser

    check_script(get_args_parser().parse_args(words))


def check_script(launched: argparse.Namespace) -> None:
    words = launched.training_script_args
    if launched.module:
        assert launched.training_script == "salad_compile.command_line"
        build_parser(words[0]).parse_args(words)
    else:
        assert (ROOT / launched.training_script).is_file()


def tensorboard(words: list[str], code: int) -> None:
    """Not run: a server."""
    assert importlib.util.find_spec("tensorboard") is not None


CHECKS: dict[str, Callable[[list[str], int], None]] = {
    "salad-compile": ours,
    "make": make,
    "pip": pip,
    "hf": hub,
    "python": python,
    ".venv/bin/python": python,
    "accelerate": accelerate,
    "torchrun": torchrun,
    "tensorboard": tensorboard,
}


# --- what is left out -------------------------------------------------------------------------------------------------


def test_few_blocks_are_not_run_and_each_says_why() -> None:
    left_out = [block for page in PAGES for block in blocks_of(page) if block.not_run is not None]
    assert len(left_out) <= MOST_NOT_RUN, [str(block) for block in left_out]
    for block in left_out:
        assert len((block.not_run or "").split()) >= 3, f"{block}: why is it not run?"
        if block.language == "python":
            compile(block.code, str(block.page), "exec")


def test_blocks_have_a_language() -> None:
    """A block of Python without one would not run."""
    for page in PAGES[1:]:
        for block in blocks_of(page):
            assert block.language in ("python", "bash", "text", "json"), f"{block}: {block.language!r}"


def test_blocks_with_fresh_names_are_among_the_settings() -> None:
    blocks = [block.code for block in blocks_of(SETTINGS) if block.language == "python"]
    for fragment in world.FRESH:
        assert sum(fragment in code for code in blocks) == 1, f"settings.md has no block, or several, with {fragment!r}"
