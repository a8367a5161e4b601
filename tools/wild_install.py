"""Install what tests/wild/requirements.txt lists and is missing into a folder of its own: `build/wild/site`.

`SALAD_WILD_SITE` names another folder.
"""

from __future__ import annotations

import sys

from tests.wild.stand_ins import ROOT, SITE
from tools.foreign_packages import install

REQUIREMENTS = ROOT / "tests" / "wild" / "requirements.txt"


def main() -> int:
    """0 if everything is there in the end, else 1 with a sentence that says what to do."""
    left = install(REQUIREMENTS, SITE)
    if not left:
        return 0
    print(
        "the models of other projects could not be installed: `make test-wild` needs a network once, to fetch "
        f"{', '.join(left)} from the package index (about 90 MB). All other tests do without.",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
