"""What these tests share: a checkpoint of the tiny Wan, a SALAD file for it, and running a command."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import salad_compile
from salad_compile.calls import adapters
from salad_compile.command_line import main
from tests.models.zoo import CASES
from tests.support import converted

# the zoo's first resolution, and settings under which its two blocks are converted
SIZE = ("--latent", "2x14x22", "--text-tokens", "17")
SETTINGS = ("--min-tokens", "90", "--set", "query_block=32", "--set", "key_block=16", "--lora-rank", "3")


@dataclass(frozen=True)
class Outcome:
    """What one command did. out, err: its stdout and stderr."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        """Of all of stdout."""
        return json.loads(self.out)


Run = Callable[..., Outcome]


@pytest.fixture(autouse=True)
def no_adapters_of_other_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """What tests before this one registered in the same process, and no forward called, is no business of a command."""
    monkeypatch.setattr(adapters, "_unmet", {})


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `salad-compile` with these words, in this process."""

    def run(*words: object) -> Outcome:
        capsys.readouterr()
        code = main([str(word) for word in words])
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What diffusers' save_pretrained writes of the tiny Wan, in bf16."""
    directory = tmp_path_factory.mktemp("checkpoints") / "wan"
    CASES["Wan"].build().to(torch.bfloat16).save_pretrained(directory)  # type: ignore[operator]
    return directory


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory, wan: Path) -> Path:
    """A pipeline's directory as of Wan 2.2: two experts, of which only the first has weights here."""
    directory = tmp_path_factory.mktemp("pipelines") / "wan"
    index = {"_class_name": "WanPipeline", "vae": [None, None]}
    for name in ("transformer", "transformer_2"):
        (directory / name).mkdir(parents=True)
        (directory / name / "config.json").write_text((wan / "config.json").read_text())
        index[name] = ["diffusers", "WanTransformer3DModel"]
    weights = "diffusion_pytorch_model.safetensors"
    (directory / "transformer" / weights).write_bytes((wan / weights).read_bytes())
    (directory / "model_index.json").write_text(json.dumps(index))
    return directory


@pytest.fixture(scope="session")
def salad_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Branches for `wan`, none of them zero."""
    model = converted(CASES["Wan"])
    return salad_compile.save(model, tmp_path_factory.mktemp("branches") / "salad.safetensors")
