"""The scripts for shells, run in each that is installed: commands, options, choices, and files elsewhere."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from salad_compile.command_line import COMMANDS, completion
from tests.salad_compile.command_line.conftest import Run

# zsh completes in an editor of lines alone: what its two functions are given is written down in their place
ZSH = """\
compdef() {{ }}
compadd() {{
    local each found=1
    for each in "${{@:2}}"; do [[ $each == $words[CURRENT]* ]] && print -r -- $each && found=0; done
    return found
}}
_files() {{ print -rl -- $words[CURRENT]*(N) }}
{script}
words=({line}); CURRENT=$#words; _salad_compile
"""
BASH = """\
{script}
COMP_WORDS=({line}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _salad_compile
printf "%s\\n" "${{COMPREPLY[@]}}"
"""
FISH = """\
{script}
complete -C {line}
"""


def quoted(words: tuple[str, ...]) -> str:
    return " ".join(f"'{word}'" for word in words)


def in_one(words: tuple[str, ...]) -> str:
    return f"'{' '.join(words)}'"


TRIALS = {"bash": (BASH, quoted, ["-c"]), "zsh": (ZSH, quoted, ["-fc"]), "fish": (FISH, in_one, ["--no-config", "-c"])}
INSTALLED = [
    pytest.param(shell, marks=pytest.mark.skipif(shutil.which(shell) is None, reason=f"there is no {shell}"))
    for shell in TRIALS
]


def completed(shell: str, folder: Path, *words: str) -> list[str]:
    """What a shell proposes for the last word, in a folder; bash adds files by itself, and not here."""
    frame, line, flags = TRIALS[shell]
    script = completion.SHELLS[shell](completion.proposals())
    text = frame.format(script=script, line=line(("salad-compile", *words)))
    done = subprocess.run([shell, *flags, text], capture_output=True, text=True, cwd=folder, timeout=60)
    assert not done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("shell", INSTALLED)
def test_what_is_proposed(shell: str, tmp_path: Path) -> None:
    def proposed(*words: str) -> list[str]:
        return completed(shell, tmp_path, *words)

    assert sorted(proposed("")) == sorted(COMMANDS)
    assert proposed("pl") == ["plan"]
    assert proposed("doctor", "--r") == ["--run"]
    assert proposed("plan", "--heig") == ["--height"]
    assert proposed("plan", "model", "--dtype", "") == ["bfloat16", "float16", "float32", "float64"]
    assert {"encode", "inspect", "convert"} <= set(proposed("latents", ""))
    assert proposed("latents", "encode", "clips", "--fp") == ["--fps"]
    assert proposed("completion", "") == sorted(completion.SHELLS)
    (tmp_path / "Wan2.1.json").write_text("{}")
    assert proposed("plan", "Wan") == ([] if shell == "bash" else ["Wan2.1.json"])


def test_every_shell_has_a_trial() -> None:
    assert set(TRIALS) == set(completion.SHELLS)


def test_the_command_prints_the_script(command: Run) -> None:
    for shell, script in completion.SHELLS.items():
        assert command("completion", shell).out == script(completion.proposals())
    assert command("completion", "tcsh").code != 0
