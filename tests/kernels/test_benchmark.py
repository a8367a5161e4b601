"""The CPU benchmark runs and leaves complete rows."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "attention_cpu.py"


def test_quick_run_writes_complete_rows(tmp_path: Path) -> None:
    output = tmp_path / "rows.json"
    command = [sys.executable, str(SCRIPT), "--quick", "--output", str(output)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    rows = json.loads(output.read_text())
    assert all(row["row"] in run.stdout for row in rows)
    names = " ".join(row["row"] for row in rows)
    for wanted in ("dense SDPA", "dense matmuls bfloat16", "block-sparse forward + backward", "operator forward"):
        assert wanted in names
    for row in rows:
        assert row["threads"] == 2
        assert 0.7 <= row["measured_sparsity"] <= 0.8  # 2 of 8 blocks
        assert len(row["timings_ms"]) == 2
        assert min(row["timings_ms"]) > 0
        assert row["baseline"] in names
