"""A signal to a whole group of processes, as terminals and job schedulers send it: the run ends as it says."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from pathlib import Path

import pytest

from salad_compile.salad_files.runs import complete_checkpoints
from salad_compile.training import read_log
from tests.end_to_end.train_life import forkserver, live
from tests.salad_compile.training.tiny import SETTINGS, write_run

RUN = dataclasses.replace(SETTINGS, steps=400, batch=2, micro_batch=1, checkpoint_every=400, workers=2)


@pytest.mark.parametrize(("number", "distilled"), [(signal.SIGTERM, 0), (signal.SIGINT, 400), (signal.SIGHUP, 0)])
def test_a_signal_to_the_group_ends_with_a_checkpoint(tmp_path: Path, number: signal.Signals, distilled: int) -> None:
    write_run(tmp_path, dataclasses.replace(RUN, distillation_steps=distilled))
    output = tmp_path / "run"
    given = {"model": "model", "latents": "latents", "settings": "settings.json", "conversion": "conversion.json"}
    words = ["train", *(word for name, file in given.items() for word in (f"--{name}", str(tmp_path / file)))]
    process = forkserver().Process(target=live, args=([*words, "--output", str(output)], str(tmp_path)))
    process.start()
    while len(read_log(output)) < 3:
        assert process.is_alive(), (tmp_path / "said").read_text()
        time.sleep(0.01)
    os.killpg(process.pid or 0, number)
    process.join()
    said = (tmp_path / "said").read_text()
    assert process.exitcode == 128 + number, said
    assert "Traceback" not in said
    assert f"{number.name}: after this step the run writes a checkpoint" in said
    last = max(line["step"] for line in read_log(output))
    assert [checkpoint.step for checkpoint in complete_checkpoints(output)] == [last]
    assert last < RUN.steps
