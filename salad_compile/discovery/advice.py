"""What the measured evidence says of a configuration at a length. tests/docs/test_numbers.py holds it to the rows."""

from __future__ import annotations

from collections.abc import Iterable

from salad_compile.config import SaladConfig

# The longest sequence of which smaller query blocks, and other selections, were measured (docs/evidence.md).
MEASURED_TOKENS = 16_384
# Shares of the loss gap that means of 256 tokens close without training, on real videos of that length.
GAP_CLOSED = {"tail-only": 44, "tail-only-64": 63, "error-only": 62, "error-only-64": 72}


def advice(config: SaladConfig, tokens: Iterable[int]) -> list[str]:
    """Sentences about settings that closed more of the gap where the sites of these lengths are; none beyond them.

    They say nothing of time: what was not timed at real lengths is said to be so.
    """
    longest = max(tokens, default=0)
    if not 0 < longest <= MEASURED_TOKENS or config.pattern != "topk" or config.compensation == "none":
        return []
    if config.query_block <= 64:
        return [
            f'At {longest:,} tokens pattern="error8" may close more of the gap: {GAP_CLOSED["error-only-64"]} % where '
            f"this pattern closed {GAP_CLOSED['tail-only-64']} %, untrained (docs/method.md). Its time was not "
            "measured."
        ]
    return [
        f"At {longest:,} tokens smaller query blocks may close more of the gap: query_block=64 "
        f'{GAP_CLOSED["tail-only-64"]} %, and with pattern="error8" {GAP_CLOSED["error-only-64"]} %, where blocks of '
        f"128 closed {GAP_CLOSED['tail-only']} %, untrained (docs/method.md). Their time with means was not measured."
    ]
