"""Random changes of files: of their bytes, and of the JSON in them."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

ATTACKS = ("os:system", "trap.py:Trap", "../../etc/passwd", "/etc/passwd", "builtins:exec", "a\0b", "x" * 5000)
WILD = (None, True, -1, 0, 1, 2**31, 2**63, 10**30, 1e308, float("nan"), float("inf"), "", [], {}, [[]], *ATTACKS)


def mutate(file: Path, chance: random.Random) -> str:
    """Change a file in place; says how."""
    content = file.read_bytes()
    if chance.random() < 0.5 and file.suffix in (".json", ".jsonl", ".safetensors"):
        changed, said = _structure(content, file.suffix, chance)
    else:
        changed, said = _bytes(content, chance)
    file.write_bytes(changed)
    return f"{file.name}: {said}"


def _bytes(content: bytes, chance: random.Random) -> tuple[bytes, str]:
    data, kind = (
        bytearray(content),
        chance.choice(("bit", "bits", "cut", "zeros", "insert", "twice", "empty", "header")),
    )
    place = chance.randrange(max(len(data), 1))
    if kind == "empty" or not data:
        return b"", "emptied"
    if kind == "cut":
        return bytes(data[:place]), f"cut at {place}"
    if kind == "zeros":
        length = min(chance.randint(1, 4096), len(data) - place)
        data[place : place + length] = bytes(length)
    elif kind == "insert":
        data[place:place] = chance.randbytes(chance.randint(1, 64))
    elif kind == "twice":
        data[place:place] = data[place : place + chance.randint(1, 512)]
    elif kind == "header":
        data[:8] = chance.choice((2**63, 2**40, len(data), 8, 0, 10**7)).to_bytes(8, "little")
    else:
        for _ in range(1 if kind == "bit" else chance.randint(2, 20)):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(data), f"{kind} at {place}"


def _structure(content: bytes, suffix: str, chance: random.Random) -> tuple[bytes, str]:
    try:
        if suffix == ".json":
            values, said = _change(json.loads(content), chance)
            return json.dumps(values).encode(), said
        if suffix == ".jsonl":
            lines = content.decode().splitlines()
            number = chance.randrange(len(lines))
            values, said = _change(json.loads(lines[number]), chance)
            lines[number] = json.dumps(values)
            return ("\n".join(lines) + "\n").encode(), f"line {number}, {said}"
        length = int.from_bytes(content[:8], "little")
        header, said = _change(_with_inner(json.loads(content[8 : 8 + length])), chance)
        text = json.dumps(_without_inner(header)).encode()
        return len(text).to_bytes(8, "little") + text + content[8 + length :], said
    except (ValueError, IndexError, RecursionError):
        return _bytes(content, chance)


def _with_inner(header: dict[str, Any]) -> dict[str, Any]:
    """JSON inside the strings of the metadata becomes part of the tree."""
    metadata = header.get("__metadata__", {})
    header["__metadata__"] = {k: json.loads(v) if v.startswith("{") else v for k, v in metadata.items()}
    return header


def _without_inner(header: Any) -> Any:
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if isinstance(metadata, dict):
        header["__metadata__"] = {k: json.dumps(v) if isinstance(v, dict) else v for k, v in metadata.items()}
    return header


def _change(values: Any, chance: random.Random) -> tuple[Any, str]:
    """One place of a tree of objects and lists: gone, another value, twice, or very deep."""
    whole = {"root": copy.deepcopy(values)}
    inner: Any = whole
    key: Any = "root"
    path = []
    while isinstance(inner[key], (dict, list)) and inner[key] and chance.random() < 0.85:
        inner = inner[key]
        key = chance.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
        path.append(key)
    kind = chance.choice(("gone", "value", "value", "near", "deep", "twice"))
    if kind == "gone" and path:
        del inner[key]
    elif kind == "near" and isinstance(inner[key], (int, float)):
        inner[key] = inner[key] * chance.choice((2, 0.5, -1)) + chance.choice((0, 1, 0.01))
    elif kind == "near" and isinstance(inner[key], str):
        inner[key] += "x"
    elif kind == "twice" and isinstance(inner, list):
        inner.append(copy.deepcopy(inner[key]))
    elif kind == "deep":
        for _ in range(500):
            inner[key] = [inner[key]]
    else:
        inner[key] = chance.choice(WILD)
    return whole["root"], f"{kind} at {'.'.join(map(str, path))}"
