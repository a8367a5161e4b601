"""Install what tests/wild/requirements.txt lists and is missing into a folder of its own: `build/wild/site`.

Nothing of them enters the environment: `--no-deps --target`. `SALAD_WILD_SITE` names another folder.
"""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import distributions

from tests.wild.stand_ins import ROOT, SITE

REQUIREMENTS = ROOT / "tests" / "wild" / "requirements.txt"


def missing() -> list[str]:
    """The requirements that the folder does not hold in their version."""
    wanted = [line for line in REQUIREMENTS.read_text().splitlines() if line and not line.startswith("#")]
    there = {f"{_plain(each.name)}=={each.version}" for each in distributions(path=[str(SITE)])}
    return [line for line in wanted if f"{_plain(line.partition('==')[0])}=={line.partition('==')[2]}" not in there]


def main() -> int:
    """0 if everything is there in the end, else 1 with a sentence that says what to do."""
    names = missing()
    if not names:
        return 0
    print(f"installing {', '.join(names)} into {SITE}", flush=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(SITE),
        "--upgrade",
        *names,
    ]
    if subprocess.run(command, check=False).returncode == 0 and not missing():
        return 0
    print(
        "the models of other projects could not be installed: `make test-wild` needs a network once, to fetch "
        f"{', '.join(names)} from the package index (about 90 MB). All other tests do without.",
        file=sys.stderr,
    )
    return 1


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    sys.exit(main())
