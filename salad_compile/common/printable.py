"""Text that others wrote, fit for a terminal."""

from __future__ import annotations

import re

# Control signs but the end of a line and the tab, what turns the direction of writing, and halves of signs.
_STEERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""The text with what steers a terminal written out, as `\x1b`.

    Names in a file of somebody else may hold sequences that clear the screen, or set its title or the clipboard.
    """
    return _STEERS.sub(lambda sign: sign[0].encode("unicode_escape").decode(), text)
