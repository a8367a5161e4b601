"""Which clips a folder has, and which captions."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from salad_compile.errors import ConfigError, LatentLayoutError, SaladError
from salad_compile.latents.encoding.finding import find_clips
from tests.salad_compile.latents.encoding import world


def put(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


def captions(folder: Path, **options: object) -> dict[str, str]:
    return {clip.name: clip.caption for clip in find_clips(folder, **options).clips}  # type: ignore[arg-type]


def test_videos_and_folders_of_images_with_texts_beside(tmp_path: Path) -> None:
    put(tmp_path, "b10.mp4", "b9.webm", "sub/c.gif", "frames/0.png", "frames/1.png", ".hidden/d.mp4", "sub/note.pdf")
    put(tmp_path, "both.mp4", "both.webm")
    for name in ("b10", "b9", "sub/c", "frames", "both"):
        (tmp_path / f"{name}.txt").write_text(f"\ufeffabout {name}\n", encoding="utf-8")
    put(tmp_path, "silent.mp4")
    found = find_clips(tmp_path)
    assert {clip.name: clip.caption for clip in found.clips} == {
        "b9": "about b9",
        "b10": "about b10",
        "both (both.mp4)": "about both",
        "both (both.webm)": "about both",
        "frames": "about frames",
        "sub/c": "about sub/c",
    }
    assert [clip.name for clip in found.clips][:2] == ["b9", "b10"]
    assert list(map(str, found.left_out)) == ["silent: it has no caption: there is no silent.txt beside it"]


def test_tables(tmp_path: Path) -> None:
    clips = put(tmp_path / "clips", "a.mp4", "sub/b.mp4", "c.mp4")
    (clips / "c.txt").write_text("from a file")
    (clips / "metadata.csv").write_text('file_name,text\na.mp4,"with, comma"\nsub/b.mp4,two\ngone.mp4,three\n')
    found = find_clips(clips)
    assert {clip.name: clip.caption for clip in found.clips} == {
        "a": "with, comma",
        "sub/b": "two",
        "c": "from a file",
    }
    assert [(p.name, p.reason.startswith(f"{clips}/metadata.csv lists it")) for p in found.left_out] == [
        ("gone.mp4", True)
    ]
    other = tmp_path / "other.jsonl"
    rows = [{"clip": str((clips / "a.mp4").resolve()), "said": "one", "caption": "no"}, {"clip": "sub/b", "said": "2"}]
    other.write_text("\n".join(map(json.dumps, rows)))
    asked = {"captions": other, "file_column": "clip", "caption_column": "said"}
    assert captions(clips, **asked) == {"a": "one", "sub/b": "2", "c": "from a file"}


def test_tables_as_spreadsheets_and_others_write_them(tmp_path: Path) -> None:
    for number, text in enumerate(
        [
            'File_Name;Caption\r\na.mp4;"one; two"\r\n;\r\n',
            "file\ttext\na.mp4\tone; two\n",
            'file, text\na.mp4, "one; two"\n',
        ]
    ):
        clips = put(tmp_path / str(number), "a.mp4")
        (clips / "metadata.csv").write_text(text, newline="")
        assert captions(clips) == {"a": "one; two"}
    clips = put(tmp_path / "lines", "a.mp4")
    rows = {"file": "a.mp4", "text": "one\u2028two\x85three"}  # line ends, but not of these formats
    (clips / "metadata.csv").write_text(f"file,text\na.mp4,{rows['text']}\n", encoding="utf-8")
    assert captions(clips) == {"a": rows["text"]}
    (clips / "metadata.jsonl").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    assert captions(clips) == {"a": rows["text"]}
    (tmp_path / "link").symlink_to(clips)
    (clips / "metadata.jsonl").write_text(json.dumps({"file": str(tmp_path / "link" / "a.mp4"), "text": "one"}))
    assert captions(tmp_path / "link") == {"a": "one"}


def test_nothing_that_a_table_lists_is_left_out_in_silence(tmp_path: Path) -> None:
    clips = put(tmp_path / "clips", "a.mp4", "b.png", "a.control.mp4")
    put(tmp_path, "outside.mp4")
    rows = ["a,one", "a.mp4,two", "b.png,three", "a.control.mp4,four", "../outside.mp4,five"]
    (clips / "metadata.csv").write_text("\n".join(["file,text", *rows]))
    found = find_clips(clips)
    assert {clip.name: clip.caption for clip in found.clips} == {"a": "two"}
    assert {problem.name: problem.reason.partition("lists it, and ")[2] for problem in found.left_out} == {
        "a": "another row names the same clip",
        "b.png": "it is no clip",
        "a.control.mp4": "it is no clip",
        "../outside.mp4": f"it is not below {clips}",
    }


def test_folders_behind_links_and_numbers_of_other_scripts(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere", "b.mp4", "b.txt", "b.reference.png")
    clips = put(
        tmp_path / "clips", "a1\u00b22.mp4", "a1\u00b22.txt", "\u0663.mp4", "\u0663.txt"
    )  # a superscript, an Arabic 3
    (clips / "more").symlink_to(tmp_path / "elsewhere")
    (clips / "loop").symlink_to(clips)
    (tmp_path / "elsewhere" / "up").symlink_to(tmp_path)
    found = {clip.name: set(clip.beside) for clip in find_clips(clips).clips}
    assert found == {"a1\u00b22": set(), "\u0663": set(), "more/b": {"reference"}}


@pytest.mark.parametrize(
    ("table", "text", "options", "message"),
    [
        ("metadata.csv", "file,about\na.mp4,x\n", {}, "has no column of captions .*; it has file, about: say which"),
        ("metadata.csv", "file,text\na.mp4,x\n", {"caption_column": "txt"}, "no column 'txt'.*Did you mean 'text'"),
        ("metadata.csv", "file,text\na.mp4,x\na.mp4,y\n", {}, "row 2: a.mp4 is listed twice"),
        ("metadata.csv", "file,text\na.mp4\n", {}, "row 1: it needs a file in 'file' and a text in 'text'"),
        ("metadata.csv", "file,text\n", {}, "lists nothing"),
        (
            "metadata.csv",
            "file,text\na.mp4,a cat, walking\n",
            {},
            "row 1: it has more fields .*Put a text with ',' in it",
        ),
        ("metadata.csv", "file,text,text\na.mp4,x,y\n", {}, "has 2 columns 'text'"),
        ("metadata.jsonl", '{"file": "a.mp4"', {}, "line 1: not JSON"),
        ("metadata.jsonl", "[" * 100_000, {}, "line 1: not JSON"),
        ("metadata.jsonl", "[1]", {}, "line 1: it is not a JSON object"),
        ("notes.txt", "x", {"captions": "notes.txt"}, "is not a table of captions"),
        ("notes.txt", "x", {"captions": "gone.csv"}, "gone.csv cannot be read: .*No such file"),
        ("notes.txt", "x", {"caption_column": "said"}, "no table has the columns asked for"),
    ],
)
def test_tables_that_cannot_be_used(
    tmp_path: Path, table: str, text: str, options: dict[str, str], message: str
) -> None:
    put(tmp_path, "a.mp4")
    (tmp_path / table).write_text(text)
    if "captions" in options:
        options = {"captions": str(tmp_path / options["captions"])}
    with pytest.raises(ConfigError, match=message):
        find_clips(tmp_path, **options)  # type: ignore[arg-type]


def test_a_pipe_in_the_place_of_a_caption_is_not_waited_for(tmp_path: Path) -> None:
    put(tmp_path, "a.mp4", "a.txt", "b.mp4")
    os.mkfifo(tmp_path / "b.txt")
    found = find_clips(tmp_path)
    assert [clip.name for clip in found.clips] == ["a"]
    assert "its caption b.txt cannot be read: " in str(found.left_out[0])


def test_half_a_sign_is_no_caption(tmp_path: Path) -> None:
    put(tmp_path, "a.mp4", "b.mp4")
    rows = [{"file": "a.mp4", "text": "a cat"}, {"file": "b.mp4", "text": "a dog \ud83d"}]  # a picture, cut in two
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = find_clips(tmp_path)
    assert [clip.name for clip in found.clips] == ["a"]
    assert str(found.left_out[0]).startswith(f"b: its caption in {tmp_path / 'metadata.jsonl'} holds half of a sign")


def test_folders_without_clips(tmp_path: Path) -> None:
    def said(folder: Path) -> str:
        with pytest.raises(SaladError) as error:
            find_clips(folder)
        assert isinstance(error.value, LatentLayoutError)
        return str(error.value)

    assert "is not there: name a folder of videos" in said(tmp_path / "gone")
    assert said(put(tmp_path / "e", ".x")).endswith("and no folder of images; it has 1 other files.")
    assert "but 2 images: put those of each clip into a folder" in said(put(tmp_path / "i", "1.png", "2.png"))
    assert "is a file" in said(tmp_path / "i" / "1.png")
    assert "none of the 2 clips in" in said(put(tmp_path / "m", "a.mp4", "b.gif"))


def test_an_origin_changes_with_the_clip_and_with_its_caption(tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    world.write_images(folder / "a", world.moving(2, 8, 8))
    (folder / "a.txt").write_text("one")
    first = find_clips(folder).clips[0].origin
    assert find_clips(folder).clips[0].origin == first
    (folder / "a.txt").write_text("two")
    second = find_clips(folder).clips[0].origin
    (folder / "a" / "frame2.png").write_bytes((folder / "a" / "frame1.png").read_bytes())
    assert len({first, second, find_clips(folder).clips[0].origin}) == 3


def test_what_is_no_file_and_names_that_are_no_text_are_left_out(tmp_path: Path) -> None:
    put(tmp_path, "a.mp4")
    (tmp_path / "a.txt").write_text("a cat")
    (tmp_path / "gone.mp4").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / os.fsdecode(b"\xff.mp4")).write_bytes(b"x")
    found = find_clips(tmp_path)
    assert [clip.name for clip in found.clips] == ["a"]
    assert {problem.name: problem.reason for problem in found.left_out} == {
        "gone": "it leads nowhere",
        "pipe": "it is neither a file nor a folder",
        "\\xff": "its name is not UTF-8: give it another one",
    }
    (tmp_path / "a.mp4").unlink()
    with pytest.raises(LatentLayoutError, match=r"no clip in .* can be used: 3 damaged items"):
        find_clips(tmp_path)
