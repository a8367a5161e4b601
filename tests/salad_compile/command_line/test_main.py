"""The frame around all commands: help, exit codes, errors, pipes."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import salad_compile
from salad_compile import command_line
from salad_compile.command_line import COMMANDS, FAILED, INTERRUPTED, NO, PIPE_CLOSED, WRONG, build_parser
from salad_compile.errors import ConfigError, NoEligibleSiteError
from tests.salad_compile.command_line.conftest import Run


def fake_command(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Let every command raise `error`."""

    def run(arguments: Any) -> int:
        raise error

    module = SimpleNamespace(HELP="", add_arguments=lambda parser: None, run=run)
    monkeypatch.setattr(command_line, "command_module", lambda name: module)


@pytest.mark.parametrize("words", [[], ["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_says_what_there_is(command: Run, words: list[str]) -> None:
    outcome = command(*words)
    assert outcome.code == (0 if words else WRONG)
    assert "example:" in outcome.out
    assert all(name in outcome.out for name in (COMMANDS if words in ([], ["--help"]) else words))
    assert "\x1b" not in outcome.out


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_of_the_help_parse(name: str) -> None:
    examples = re.findall(rf"^    salad-compile ({name} .*)$", command_line.command_module(name).HELP, re.MULTILINE)
    assert examples
    parser = build_parser(name)
    for example in examples:
        assert parser.parse_args(shlex.split(example.partition(" | ")[0])).command == name


def test_version(command: Run) -> None:
    assert command("--version").out == f"salad-compile {salad_compile.__version__}\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["plam"], "invalid choice: 'plam'"),
        (["plam", "--sparsity", "0.9"], "). Did you mean 'plan'?\n"),
        (["latents", "encod"], "). Did you mean 'encode'?\n"),
        (["plan", "model", "--pattern", "topkk"], "). Did you mean 'topk'?\n"),
        (["plan", "model", "--spasity=0.9", "--json"], "=0.9. There is no --spasity; did you mean '--sparsity'?\n"),
        (["--versoin", "plan", "model"], "There is no --versoin; did you mean '--version'?\n"),
        (["latents", "encode", "clips", "--modl", "x"], "--output. There is no --modl; did you mean '--model'?\n"),
        (["inspect"], "the following arguments are required: FILE"),
        (["inspect", "file", "--jso"], "unrecognized arguments: --jso. There is no --jso; did you mean '--json'?\n"),
        (["inspect", "file", "--xylophone"], "unrecognized arguments: --xylophone\n"),
        (["plan", "model", "--latent", "21x60"], "'21x60' is not a size: write three numbers, 21x30x52"),
        (["plan", "model", "--frames", "0"], "0 is not a number of 1 or more"),
        (["plan", "model", "--frames", "9" * 30], "is not a number of 1 or more, below 2**31"),
        (["plan", "model", "--latent", f"{9 * 10**30}x1x1"], "is not a size"),
        (["convert", "model", "--output", "file", "--seed", "-1"], "-1 is not a seed, which is 0 or more, below 2**63"),
        (["latents", "inspect", "data", "--sample", "0"], "0 is not a number of 1 or more"),
        (["latents", "inspect", ""], "what inspect is given is empty"),
        (["train", "--model", "wan", "--latents", "data", "--output", ""], "what --output is given is empty"),
        (["plan", "model", "--settings="], "what --settings= is given is empty"),
    ],
)
def test_wrong_usage(command: Run, words: list[str], said: str) -> None:
    outcome = command(*words)
    assert outcome.code == WRONG
    assert outcome.out == ""
    assert said in outcome.err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("no such setting."), WRONG),
        (FileNotFoundError("no file there"), WRONG),
        (NoEligibleSiteError("nothing to convert"), NO),
        (KeyboardInterrupt(), INTERRUPTED),
        (BrokenPipeError(), PIPE_CLOSED),
    ],
)
def test_errors_are_one_line_and_an_exit_code(
    command: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    fake_command(monkeypatch, error)
    outcome = command("doctor", "--json")
    assert outcome.code == code
    assert outcome.out == ""
    lines = outcome.err.splitlines()
    expected = {PIPE_CLOSED: [], INTERRUPTED: ["salad-compile: interrupted"]}
    assert lines == expected.get(code, [f"salad-compile: error: {error}"])


def test_debug_shows_the_traceback(command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_command(monkeypatch, ConfigError("no such setting."))
    outcome = command("doctor", "--debug")
    assert outcome.code == WRONG
    assert "Traceback" in outcome.err
    assert outcome.err.endswith("salad-compile: error: no such setting.\n")


def test_an_unexpected_error_has_a_traceback_and_a_code_of_its_own(
    command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_command(monkeypatch, ZeroDivisionError("by zero"))
    outcome = command("doctor")
    assert outcome.code == FAILED
    assert "Traceback" in outcome.err
    assert "ZeroDivisionError: by zero" in outcome.err.splitlines()[-1]


def out_of_memory() -> Exception:
    """What the allocator of the CPU raises, as a compiler passes it on."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    wrapped = RuntimeError("while compiling")
    wrapped.__cause__ = caught.value
    return wrapped


@pytest.mark.parametrize("make", [out_of_memory, MemoryError, lambda: torch.OutOfMemoryError("CUDA out of memory")])
def test_memory_that_runs_out_is_one_line_with_what_helps(
    command: Run, monkeypatch: pytest.MonkeyPatch, make: Any
) -> None:
    fake_command(monkeypatch, make())
    outcome = command("doctor")
    assert outcome.code == WRONG
    assert outcome.err.startswith("salad-compile: error: memory ran out: fewer frames or a smaller size take less")
    assert len(outcome.err.splitlines()) == 1


def test_an_error_that_torch_wrapped_is_ours(command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped = RuntimeError("backend='salad' raised ...")
    wrapped.inner_exception = ConfigError("no such option.")  # type: ignore[attr-defined]
    fake_command(monkeypatch, wrapped)
    outcome = command("doctor")
    assert (outcome.code, outcome.err) == (WRONG, "salad-compile: error: no such option.\n")


def test_torch_wraps_errors_of_backends_with_that_attribute() -> None:
    from torch._dynamo.exc import BackendCompilerFailed

    inner = ConfigError("no such option.")
    assert BackendCompilerFailed(lambda: None, inner, None).inner_exception is inner


def test_a_command_that_is_not_installed(command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMMANDS, "paint", "paints")
    outcome = command("paint")
    assert outcome.code == WRONG
    assert "this installation has no command 'paint'" in outcome.err
    assert "Traceback" not in outcome.err


def test_help_and_version_load_no_torch() -> None:
    code = (
        "import sys; from salad_compile.command_line import main\n"
        f"for words in [['--help'], ['--version'], *([name, '--help'] for name in {list(COMMANDS)!r})]:\n"
        "    assert main(words) == 0, words\n"
        "    heavy = {'torch', 'diffusers', 'rich', 'huggingface_hub', 'numpy'} & set(sys.modules)\n"
        "    assert not heavy, (words, heavy)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", timeout=600)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("module", ["salad_compile", "salad_compile.command_line"])
def test_runs_as_a_module(module: str) -> None:
    result = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, timeout=600)
    assert (result.returncode, result.stdout) == (0, f"salad-compile {salad_compile.__version__}\n")


def test_no_result_is_lost_in_its_printing() -> None:
    """An encoding without the lines of tables (LANG=C), and streams that were closed before the start."""
    code = (
        "import sys, types; from salad_compile import command_line\n"
        "run = lambda arguments: print('\\u2500 found', file=sys.stderr) or print('\\u2500 found \\udcff') or 0\n"
        "module = types.SimpleNamespace(HELP='', add_arguments=lambda parser: None, run=run)\n"
        "command_line.command_module = lambda name: module\n"
        "sys.exit(command_line.main(['doctor']))"
    )
    for encoding, sign in (("ascii", "?"), ("utf-8", "\u2500")):
        environment = os.environ | {"PYTHONIOENCODING": encoding}
        command = [sys.executable, "-c", code]
        result = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, timeout=600)
        assert (result.returncode, result.stdout, result.stderr) == (0, f"{sign} found ?\n", f"{sign} found\n")
    closed = subprocess.run(["sh", "-c", 'exec "$0" "$@" >&- 2>&-', *command], timeout=600)
    assert closed.returncode == 0


def test_a_reader_that_goes_away_is_no_error() -> None:
    """As `| head -0`: the pipe is closed before the command writes."""
    code = (
        "import sys, types; from salad_compile import command_line\n"
        "run = lambda arguments: print('found') or 0\n"
        "module = types.SimpleNamespace(HELP='', add_arguments=lambda parser: None, run=run)\n"
        "command_line.command_module = lambda name: module\n"
        "sys.exit(command_line.main(['doctor']))"
    )
    reading, writing = os.pipe()
    os.close(reading)
    result = subprocess.run(
        [sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, text=True, timeout=600
    )
    os.close(writing)
    assert (result.returncode, result.stderr) == (PIPE_CLOSED, "")
