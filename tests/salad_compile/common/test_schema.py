"""Every field of what is stored as JSON: it must be there, of its type and in its range, and no other field may be."""

from __future__ import annotations

import copy
import json
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from salad_compile.common.schema import InfoFields, StateFields, SummaryFields, decode, decode_file, stamp
from salad_compile.config import SaladConfig
from salad_compile.errors import ConfigError, CorruptFileError, FormatVersionError, SaladError
from salad_compile.salad_files.header import Header
from salad_compile.sites.record import SiteRecord

SITE = SiteRecord("blocks.0", "q", "k", "v", "o", heads=4, head_dim=8, value_dim=8, batch=1, tokens=64, call_index=0)
HEADER = json.loads(Header(SaladConfig(), "Net", "0" * 64, (SITE,), (), {"torch": "2"}).to_json())
FINGERPRINT = {
    "base_class": "Net",
    "base_digest": "0" * 64,
    "config": HEADER["config"],
    "base_weights": 1.5,
    "data": "1" * 64,
}
STATE = {"version": 1, "step": 3, "settings": {}, "fingerprint": FINGERPRINT, "files": {"a": 1, "b": 2}}
SUMMARY = {"steps": 3, "loss": 0.1, "validation_loss": None, "items": 9, "processes": 1, "settings": {}}
INFO = {"format": "salad-latents", "format_version": 1, "normalized": True, "statistics": {"mean": [0.0], "std": [1.0]}}
# older files are without them
OPTIONAL = {
    "checked",
    "call",
    "channels",
    "compensation",
    "compensation_pool",
    "gate_axes",
    "digest",
    "digests",
    "normalized",
}
HUGE = [float("nan"), float("inf"), -1, 10**400, 1e308, "", [], {}, None, True, "x" * 20_000]


def read(kind: type, values: Any) -> object:
    text = json.dumps(values)
    return Header.from_json(text, Path("a")) if kind is Header else decode(kind, text, "a", CorruptFileError)


def places(values: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of every field, in objects and in objects of lists."""
    for name, value in values.items() if isinstance(values, dict) else enumerate(values):
        if isinstance(values, dict):
            yield (*path, name)
        if isinstance(value, (dict, list)) and name not in ("settings", "versions", "files"):
            yield from places(value, (*path, name))


CASES = [
    pytest.param(kind, values, path, id=".".join(map(str, (kind.__name__, *path))))
    for kind, values in ((Header, HEADER), (StateFields, STATE), (SummaryFields, SUMMARY), (InfoFields, INFO))
    for path in places(values)
]


@pytest.mark.parametrize(("kind", "values", "path"), CASES)
def test_fields_are_there_and_of_their_type(kind: type, values: Any, path: tuple[Any, ...]) -> None:
    read(kind, values)
    changed = copy.deepcopy(values)
    inner = changed
    for name in path[:-1]:
        inner = inner[name]
    before = inner.pop(path[-1])
    if path[-1] not in OPTIONAL:
        with pytest.raises(CorruptFileError, match=path[-1]):
            read(kind, changed)
    inner.update({path[-1]: before, "sparsty": before})
    with pytest.raises(CorruptFileError, match="sparsty"):
        read(kind, changed)
    del inner["sparsty"]
    wrong = {"a": [1]} if isinstance(before, (int, float, str, type(None))) else 1
    inner[path[-1]] = wrong
    with pytest.raises((CorruptFileError, FormatVersionError)):
        read(kind, changed)


@pytest.mark.parametrize(("kind", "values", "path"), CASES)
def test_no_value_raises_anything_else(kind: type, values: Any, path: tuple[Any, ...]) -> None:
    for value in HUGE:
        changed = copy.deepcopy(values)
        inner = changed
        for name in path[:-1]:
            inner = inner[name]
        inner[path[-1]] = value
        try:
            read(kind, changed)
        except SaladError:
            continue


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda h: h["config"].update(sparsity=1.0), "sparsity"),
        (lambda h: h["config"].update(sparsity=-0.1), "sparsity"),
        (lambda h: h["config"].update(query_block=15), "query_block"),
        (lambda h: h["config"].update(key_block=512), "key_block"),
        (lambda h: h["config"].update(pattern="topkk"), "topk"),
        (lambda h: h["sites"].append(h["sites"][0]), "two sites"),
        (lambda h: h["sites"][0].update(key_heads=3), "3 of the key"),
        (lambda h: h["sites"][0].update(heads=2**40), "heads"),
        (lambda h: h.update(merged_weights=[1.0, 2.0]), "merged_weights"),
        (lambda h: h.update(grid={"kind": "fixed"}), "fixed"),
        (lambda h: h.update(sites=[]), "sites"),
        (lambda h: h.update(base_digest="0"), "base_digest"),
    ],
)
def test_what_contradicts_is_named(change: Any, said: str) -> None:
    header = copy.deepcopy(HEADER)
    change(header)
    with pytest.raises(CorruptFileError, match=said):
        read(Header, header)


@pytest.mark.parametrize(
    "text", ["[" * 10**6, '{"version":' * 10**5, '{"step": ' + "9" * 10**6, "{" + '"a":1,' * 10**5]
)
def test_deep_and_huge_texts_are_refused_quickly(text: str, tmp_path: Path) -> None:
    started, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CorruptFileError):
        decode(StateFields, text, "a", CorruptFileError)
    with pytest.raises((CorruptFileError, FormatVersionError)):
        Header.from_json(text, tmp_path)
    assert time.process_time() - started < 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024


def test_a_large_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "state.json").open("wb") as file:
        file.truncate(2**40)  # sparse
    with pytest.raises(CorruptFileError, match="bytes"):
        decode_file(StateFields, tmp_path / "state.json", CorruptFileError)


def test_changed_values_are_told_by_their_digest() -> None:
    stamped = stamp(SUMMARY)
    assert read(SummaryFields, stamped)
    for name, value in {"steps": 4, "loss": 0.10000001, "items": 8}.items():
        with pytest.raises(ConfigError, match="digest"):
            decode(SummaryFields, json.dumps({**stamped, name: value}), "a", ConfigError)
