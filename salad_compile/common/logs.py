"""The package's logger. `TORCH_LOGS="salad_compile"` shows it at info level, `"+salad_compile"` with the graphs."""

from __future__ import annotations

import logging

logger = logging.getLogger("salad_compile")
