"""The JSON that this package stores, declared: which fields there are, of which types, in which ranges.

Every reader goes through :func:`decode`, before anything is built of what it read. A field without a default must be
there: a default in its place would be another model than the one that was saved. Names of settings and how they go
together are checked by the classes that are made of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from salad_compile.common.checks import LARGEST_COUNT, LARGEST_SIZE
from salad_compile.common.paths import require_regular
from salad_compile.errors import SaladError

T = TypeVar("T")

LARGEST_FILE = 16 * 2**20  # bytes of a JSON file: those of a run take some kilobytes
DIGEST = "digest"

Count = Annotated[int, Meta(ge=0, le=LARGEST_COUNT)]
Size = Annotated[int, Meta(ge=1, le=LARGEST_SIZE)]
Share = Annotated[float, Meta(ge=0, lt=1)]
Text = Annotated[str, Meta(max_length=10_000)]
Digest = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Triple = Annotated[list[Size], Meta(min_length=3, max_length=3)]
Statistic = Annotated[list[float], Meta(min_length=1, max_length=100_000)]


class ConfigFields(Struct, forbid_unknown_fields=True, kw_only=True):
    """`SaladConfig`, in the header of a SALAD file. Files of before compensation have none."""

    sparsity: Share
    pattern: Text
    query_block: Size
    key_block: Size
    window: Size | None
    linear_branch: bool
    feature_map: Text
    rope_placement: Text
    gate: Text
    scaling: Text
    lora_rank: Count
    lora_alpha: float | None
    lora_targets: list[Text]
    min_tokens: Count
    dense_layers: Count
    overrides: dict[Text, dict[Text, Any]]
    lowest_sparsity: Share | None
    token_order: Text
    train_base: bool
    compensation: Text = "none"
    compensation_pool: Size = 64


class SiteFields(Struct, forbid_unknown_fields=True, kw_only=True):
    """`SiteRecord`. Older files do not have what has a default here."""

    owner: Text
    query: Text
    key: Text
    value: Text
    out: Text | None
    heads: Size
    head_dim: Size
    value_dim: Size
    batch: Size
    tokens: Size
    call_index: Count
    text_query: Text | None
    text_key: Text | None
    text_value: Text | None
    text_out: Text | None
    key_heads: Size | None
    text: Literal["none", "before", "after", "prefix"]
    text_tokens: Count
    text_argument: Text | None
    on_grid: bool
    square_mask: bool
    dropped: bool
    rotated_first: bool
    call: Literal["", "sdpa", "flex", "products", "adapter"] = ""
    gate_axes: Annotated[str, Meta(pattern="^[0-9 ]*$", max_length=20)] = ""
    channels: dict[Text, Annotated[list[Count], Meta(min_length=2, max_length=2)]] = msgspec.field(default_factory=dict)


class GridFields(Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """`GridRule`; which fields there are depends on its kind."""

    kind: Text
    names: Annotated[list[Text], Meta(max_length=3)] = msgspec.field(default_factory=list)
    axes: Triple | None = None
    patch: Triple | None = None
    size: Triple | None = None


class HeaderFields(Struct, forbid_unknown_fields=True, kw_only=True):
    """The header of a SALAD file. `checked`: how its tensors and this header are checked; older files have none."""

    format_version: int
    versions: dict[Text, Text]
    config: ConfigFields
    base_class: Text
    base_digest: Digest
    sites: Annotated[list[SiteFields], Meta(min_length=1, max_length=100_000)]
    dense_projections: list[Text]
    merged_weights: list[float]
    grid: GridFields | None
    checked: Literal["sha256"] | None = None


class VersionFields(Struct, kw_only=True):
    """What a header of any version has."""

    format_version: int
    versions: Any = None


class FingerprintFields(Struct, forbid_unknown_fields=True, kw_only=True):
    """Model and data of a run. `values`: a digest of some items; older checkpoints have none."""

    base_class: Text
    base_digest: Digest
    config: ConfigFields
    base_weights: float
    data: Digest
    values: Digest | None = None


class StateFields(Struct, forbid_unknown_fields=True, kw_only=True):
    """`state.json` of a checkpoint. `files`: name -> bytes; `digests`: name -> SHA-256; older ones have none."""

    version: int
    step: Count
    settings: dict[Text, Any]
    fingerprint: FingerprintFields
    files: Annotated[dict[Text, Count], Meta(min_length=2, max_length=2)]
    digests: dict[Text, Digest] | None = None
    digest: Digest | None = None


class StateVersion(Struct, kw_only=True):
    """What `state.json` of any version has."""

    version: int


class SummaryFields(Struct, forbid_unknown_fields=True, kw_only=True):
    """`training.json` of a finished run."""

    steps: Count
    loss: float | None
    validation_loss: float | None
    items: Count
    processes: Size
    settings: dict[Text, Any]
    outcome: dict[Text, Any] | None = None
    digest: Digest | None = None


class StatisticsFields(Struct, forbid_unknown_fields=True, kw_only=True):
    """Mean and standard deviation of each channel."""

    mean: Statistic
    std: Statistic


class InfoFields(Struct, forbid_unknown_fields=True, kw_only=True):
    """`info.json` of precomputed latents."""

    format: Text
    format_version: int
    normalized: Literal[True] = True
    statistics: StatisticsFields | None
    encoded: dict[Text, Any] | None = None
    digest: Digest | None = None


class ItemFields(Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """What the file of an item says of itself. A text may be long: captions have no bound.

    extras: shapes of what else there is.
    """

    name: str
    shape: Annotated[list[Size], Meta(min_length=4, max_length=4)]
    text_shape: Annotated[list[Size], Meta(min_length=2, max_length=2)]
    caption: str
    fps: float | None
    extras: dict[Text, Annotated[list[Count], Meta(max_length=8)]] = msgspec.field(default_factory=dict)


class RecordFields(ItemFields, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """A line of `items.jsonl`: the same, and where its file is."""

    file: Text
    bytes: Count


def decode(kind: type[T], text: str | bytes, what: str, error: type[SaladError]) -> T:
    """The declared object in a JSON text.

    Args:
        what: the file, for messages. error: the class of what is raised.

    Raises:
        error: no JSON, a field that is missing, unknown, of another type or out of range, or another `digest`.
    """
    try:
        found = msgspec.json.decode(text, type=kind)
        stated = getattr(found, DIGEST, None)
        if stated is not None and stated != _digest_of(msgspec.json.decode(text)):
            raise ValueError("its values are not those that were written (take its digest out if you changed them)")
    except (ValueError, RecursionError) as cause:  # msgspec's errors are ValueErrors
        raise error(f"{what} is not readable: {str(cause)[:300]}") from cause
    return found


def decode_file(kind: type[T], file: Path, error: type[SaladError]) -> T:
    """:func:`decode` of a file. Raises OSError too."""
    require_regular(file)
    size = file.stat().st_size
    if size > LARGEST_FILE:
        raise error(f"{file} is not readable: it has {size:,} bytes, more than a file of its kind")
    return decode(kind, file.read_bytes(), str(file), error)


def stamp(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with their `digest`, by which :func:`decode` knows that none of them has changed."""
    return {**values, DIGEST: _digest_of(json.loads(json.dumps(values)))}


def _digest_of(values: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in values.items() if name != DIGEST}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def fields_of(found: Struct) -> dict[str, Any]:
    """The object as a dictionary of lists, dictionaries and plain values."""
    values: dict[str, Any] = msgspec.to_builtins(found)
    return values
