"""The script for shells, run in bash: commands, options, choices, and files elsewhere."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from salad_compile.command_line import COMMANDS, completion
from tests.salad_compile.command_line.conftest import Run


def completed(*words: str) -> list[str]:
    """What bash proposes for the last word."""
    line = " ".join(f"'{word}'" for word in ("salad-compile", *words))
    call = f'COMP_WORDS=({line}); COMP_CWORD={len(words)}; _salad_compile; printf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(
        ["bash", "-c", completion.script() + call], capture_output=True, text=True, check=True, timeout=60
    )
    assert not done.stderr
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_what_bash_proposes() -> None:
    assert completed("") == list(COMMANDS)
    assert completed("pl") == ["plan"]
    assert completed("doctor", "--r") == ["--run"]
    assert completed("plan", "--heig") == ["--height"]
    assert completed("plan", "model", "--dtype", "") == ["bfloat16", "float16", "float32", "float64"]
    assert {"encode", "inspect", "convert"} <= set(completed("latents", ""))
    assert completed("latents", "encode", "clips", "--fp") == ["--fps"]
    assert completed("completion", "") == ["bash", "zsh"]
    assert completed("plan", "Wan") == [], "files, which bash adds by itself"


def test_the_script_of_each_shell(command: Run) -> None:
    scripts = {shell: command("completion", shell).out for shell in completion.SHELLS}
    assert scripts["zsh"].startswith("autoload")
    assert scripts["zsh"].endswith(scripts["bash"])
    assert command("completion", "fish").code != 0
