"""What comments, docstrings and documents cite, and whether it is there.

A citation is a section of docs/specification.md, a file, a test, one of our names from `salad_compile` on, or an
arXiv id.
"""

from __future__ import annotations

import ast
import importlib
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDERS = ("salad_compile", "passes", "kernels", "tests", "examples", "benchmarks", "tools", "docs")
PAGES = ("README.md", "CONTRIBUTING.md", "pyproject.toml", "Makefile", "mkdocs.yml", ".ci/run")
SPECIFICATION = "docs/specification.md"

# Files that a reader of an example would write, that a command writes, or that other projects have.
NOT_OURS = {
    "file.py": "a file of the user's",
    "my_models.py": "a file of the user's",
    "step.py": "a file of the user's",
}
# A passage that names files of another project names the project too.
ELSEWHERE = re.compile(r"\bSeen in [\w.-]+/[\w.-]+")

NUMBER = r"\d+(?:\.\d+)?"
SECTION = re.compile(
    rf"(?i:\bspecification) (?P<first>{NUMBER})(?P<more>(?:(?:,| and| to) {NUMBER})*)(?:, step (?P<step>\d+))?"
)
NUMBERED = re.compile(rf"\b(?P<page>method|[\w/]+\.md)(?:,? section|,)? (?P<number>{NUMBER})\b")
HERE = re.compile(rf"\bsections? (?P<first>{NUMBER})")
FILE = re.compile(r"(?<![\w/.<>*~-])(?P<path>(?:[\w.<>*-]+/)*[\w<>*-]+\.(?:py|md|sh|toml|yml))(?![\w/-]|\.\w)")
PLACE = re.compile(rf"(?<![\w/.<>*~-])(?P<path>(?:{'|'.join(FOLDERS)})/[\w.<>*/-]*[\w>*])")
WRITTEN = re.compile(r"(?:--(?:output|json)|>) $")  # what stands before a file that a command is to write
TEST = re.compile(r"(?P<file>[\w/]+\.py)?::(?P<test>test_\w+)")
NAME = re.compile(r"(?<![\w./-])salad_compile(?:\.(?!NAME\b)[A-Za-z_]\w*)+")
ARXIV = re.compile(r"\barXiv[: ]+(?P<id>[\w./-]*\d[\w./-]*)")
ARXIV_ID = re.compile(r"\d{2}(?:0[1-9]|1[0-2])\.\d{5}(?:v\d+)?")


@dataclass(frozen=True)
class Passage:
    """A paragraph, a docstring's paragraph or a run of comments, on one line; `line` is where it begins."""

    file: str
    line: int
    text: str


@lru_cache
def files() -> tuple[str, ...]:
    """Every file of the repository by its path, without what is built."""
    found = [ROOT / page for page in PAGES] + [path for path in ROOT.iterdir() if path.is_file()]
    for folder in FOLDERS:
        found += [path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    names = {str(path.relative_to(ROOT)) for path in found}
    linked = ("salad_compile/kernels/", "salad_compile/passes/")
    return tuple(sorted(name for name in names if not name.startswith(linked)))


@lru_cache
def passages() -> tuple[Passage, ...]:
    """Everything that is written for readers, but CHANGELOG.md, whose names are those of its time."""
    found: list[Passage] = []
    for name in files():
        if name.endswith(".py"):
            source = (ROOT / name).read_text(encoding="utf-8")
            found += [*docstrings_of(source, name), *comments_of(source, name)]
        elif name in PAGES or (name.endswith(".md") and name != "CHANGELOG.md"):
            found += paragraphs((ROOT / name).read_text(encoding="utf-8"), name, 1)
    return tuple(found)


def paragraphs(text: str, name: str, first: int) -> Iterator[Passage]:
    """The parts of a text between empty lines."""
    start, lines = first, []
    for number, line in enumerate([*text.splitlines(), ""], start=first):
        if line.strip(" #"):
            lines.append(line.strip(" #"))
            continue
        if lines:
            yield Passage(name, start, " ".join(lines))
        start, lines = number + 1, []


def docstrings_of(source: str, name: str) -> Iterator[Passage]:
    """Of modules, classes, functions and attributes."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield from paragraphs(node.value.value, name, node.lineno)


def comments_of(source: str, name: str) -> Iterator[Passage]:
    """Comments; those on lines below one another are one passage."""
    start, last, texts = 0, -1, []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        if texts and token.start[0] != last + 1:
            yield Passage(name, start, " ".join(texts))
            texts = []
        start = start if texts else token.start[0]
        last = token.start[0]
        texts.append(token.string.strip("# "))
    if texts:
        yield Passage(name, start, " ".join(texts))


@lru_cache
def sections() -> dict[str, int]:
    """Number of each heading of the specification -> how many numbered steps stand under it."""
    found: dict[str, int] = {}
    number = ""
    for line in (ROOT / SPECIFICATION).read_text(encoding="utf-8").splitlines():
        if heading := re.match(rf"#+ (?P<number>{NUMBER})\.? ", line):
            number = heading["number"]
            found[number] = 0
        elif number and line.startswith(f"{found[number] + 1}. "):
            found[number] += 1
    return found


def missing(passage: Passage) -> list[str]:
    """What a passage cites that is not there, in words."""
    faults = [*missing_sections(passage), *missing_tests(passage.text), *missing_names(passage.text)]
    if not ELSEWHERE.search(passage.text):
        faults += missing_files(passage)
    faults += [
        f"{match['id']} is not an arXiv id"
        for match in ARXIV.finditer(passage.text)
        if not ARXIV_ID.fullmatch(match["id"].rstrip("."))
    ]
    return faults


def missing_sections(passage: Passage) -> Iterator[str]:
    """Sections and steps that the specification does not have. Sections of other pages have no numbers at all."""
    for match in SECTION.finditer(passage.text):
        numbers = [match["first"], *re.findall(NUMBER, match["more"])]
        yield from (f"specification {number} is no section" for number in numbers if number not in sections())
        step = match["step"]
        if step and not 1 <= int(step) <= sections().get(numbers[-1], 0):
            yield f"specification {numbers[-1]} has no step {step}"
    for match in NUMBERED.finditer(passage.text):
        if not match["page"].endswith("specification.md"):
            yield f"{match[0]}: only the specification has numbered sections"
    if passage.file == SPECIFICATION:
        for match in HERE.finditer(passage.text):
            if match["first"] not in sections():
                yield f"section {match['first']} does not exist"


def missing_files(passage: Passage) -> Iterator[str]:
    """Paths and names of files that lead nowhere. <x> and * stand for anything."""
    for match in [*FILE.finditer(passage.text), *PLACE.finditer(passage.text)]:
        path = match["path"]
        if (
            not exists(path, passage.file)
            and path not in NOT_OURS
            and not WRITTEN.search(passage.text[: match.start()])
        ):
            yield f"{path} does not exist"


@lru_cache
def exists(path: str, cited_in: str) -> bool:
    """Whether some file or folder has this path, or one that ends in it."""
    folder = (ROOT / cited_in).parent
    if "<" not in path and "*" not in path and ((ROOT / path).exists() or (folder / path).exists()):
        return True
    pattern = "".join(
        ".*" if part in "*" or part[0] == "<" else re.escape(part) for part in re.split(r"(<\w+>|\*)", path)
    )
    return any(re.search(rf"(?:^|/){pattern}$", name) for name in files())


def missing_tests(text: str) -> Iterator[str]:
    """A test after two colons must be in the file named before them, or in any file of tests."""
    for match in TEST.finditer(text):
        candidates = [name for name in files() if name.startswith("tests/") and name.endswith(match["file"] or ".py")]
        if not any(f"def {match['test']}(" in (ROOT / name).read_text(encoding="utf-8") for name in candidates):
            yield f"{match[0]} is no test"


def missing_names(text: str) -> Iterator[str]:
    """Whole names of our modules, classes, functions and attributes. NAME stands for any."""
    yield from (f"{match[0]} does not exist" for match in NAME.finditer(text) if not resolves(match[0]))


@lru_cache
def resolves(name: str) -> bool:
    """Whether a dotted name is a module or an attribute of one."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[length:]:
            if not hasattr(found, attribute) and attribute not in getattr(found, "__annotations__", {}):
                return False
            found = getattr(found, attribute, None)
        return True
    return False
