"""Files and folders appear whole or not at all, whatever ends the writing; and what an error says of the disk."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from signround_edge.errors import UserError
from signround_edge.files import is_disk_full, is_disk_trouble, whole_files, whole_folder, write_atomically
from signround_edge.manifest import OUTSIDE, Manifest, TensorEntry
from signround_edge.run_directory import RunDirectory


def contents(folder: Path) -> dict[str, str]:
    return {file.relative_to(folder).as_posix(): file.read_text() for file in folder.rglob("*") if file.is_file()}


def write_and_end(files: list[Path], end: BaseException) -> None:
    for file in files:
        file.write_text("new")
    raise end


def test_files_take_their_names_together(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "new" / "folder" / "other"
    one.write_text("old")
    with whole_files(one, other) as (first, second):
        first.write_text("1")
        second.write_text("2")
        assert one.read_text() == "old"
        assert not other.exists()
    assert contents(tmp_path) == {"one": "1", "new/folder/other": "2"}


@pytest.mark.parametrize("end", [OSError(errno.ENOSPC, "full"), ValueError("wrong"), KeyboardInterrupt()])
def test_what_ends_the_writing_leaves_the_old_files(end: BaseException, tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_text("old")
    with pytest.raises(type(end)), whole_files(one, other) as partials:
        write_and_end(partials, end)
    assert contents(tmp_path) == {"one": "old"}


def test_a_file_that_was_not_written_is_an_error_and_nothing_appears(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), whole_files(tmp_path / "one", tmp_path / "other") as (first, _):
        first.write_text("1")
    assert contents(tmp_path) == {}


def test_a_name_that_a_folder_has_is_an_error_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_atomically(tmp_path / "a", b"text")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("end", [OSError(errno.ENOSPC, "full"), OSError(errno.EROFS, "read-only"), KeyboardInterrupt()])
def test_a_folder_that_is_not_finished_leaves_the_old_one(end: BaseException, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with whole_folder(out, "the test", marker="marker") as partial:
        (partial / "marker").write_text("old")
    expected = KeyboardInterrupt if isinstance(end, KeyboardInterrupt) else UserError
    with pytest.raises(expected), whole_folder(out, "the test", marker="marker") as partial:
        write_and_end([partial / "marker", partial / "more"], end)
    assert contents(tmp_path) == {"out/marker": "old"}


@pytest.mark.parametrize("name", [".", "../here", "", "link"])
def test_an_empty_folder_is_filled_and_stays_the_same_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (tmp_path / "link").symlink_to(here)
    monkeypatch.chdir(here)
    out, before = tmp_path / name if name == "link" else Path(name), here.stat().st_ino
    with whole_folder(out, "the test", marker="marker") as partial:
        (partial / "marker").write_text("marker")
        (partial / "folder").mkdir()
        (partial / "folder" / "file").write_text("file")
        assert contents(tmp_path / "here").keys() == {".partial/marker", ".partial/folder/file"}
    assert contents(here) == {"marker": "marker", "folder/file": "file"}
    assert sorted(path.name for path in here.iterdir()) == ["folder", "marker"]
    assert here.stat().st_ino == before == Path.cwd().stat().st_ino


def test_an_earlier_output_in_the_working_folder_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for texts in ({"marker": "1", "old": "1"}, {"marker": "2", "new": "2"}):
        with whole_folder(Path(), "the test", marker="marker") as partial:
            for name, text in texts.items():
                (partial / name).write_text(text)
    assert contents(tmp_path) == {"marker": "2", "new": "2"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["marker", "new"]


def test_a_folder_that_is_filled_in_vain_is_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="the disk is full"), whole_folder(Path(), "the test", marker="m") as partial:
        write_and_end([partial / "m"], OSError(errno.ENOSPC, "full"))
    assert list(tmp_path.iterdir()) == []
    with whole_folder(Path(), "the test", marker="m") as partial:
        (partial / "m").write_text("old")
        (partial / "more").write_text("old")
    moves = 0

    def fail_at_the_end(source: Path, target: Path) -> None:
        nonlocal moves
        moves += 1
        if moves == 4:  # the new marker, after two old files and a new one
            raise OSError(errno.EIO, "input/output error")
        os.rename(source, target)

    def write() -> None:
        with whole_folder(Path(), "the test", marker="m") as partial:
            (partial / "m").write_text("new")
            (partial / "more").write_text("new")

    with monkeypatch.context() as patch:
        patch.setattr("signround_edge.files.os.replace", fail_at_the_end)
        with pytest.raises(UserError, match="cannot be written"):
            write()
    assert contents(tmp_path) == {"m": "old", "more": "old"}


def test_what_a_killed_process_left_in_an_empty_folder_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".partial" / "scratch").mkdir(parents=True)
    with whole_folder(tmp_path, "the test") as partial:
        (partial / "file").write_text("1")
    assert contents(tmp_path) == {"file": "1"}


@pytest.mark.parametrize("name", [".", "other"])
def test_a_folder_with_other_files_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir(exist_ok=True)
    (tmp_path / name / "mine").write_text("mine")
    with pytest.raises(UserError, match="other files in it"), whole_folder(Path(name), "the test", marker="marker"):
        pass
    assert list(contents(tmp_path / name).values()) == ["mine"]


def test_a_part_of_a_run_that_cannot_be_written_leaves_no_half_file(tmp_path: Path) -> None:
    manifest = Manifest("gguf:q4_0", ["gguf"], {}, {}, {}, [OUTSIDE], {}, [TensorEntry("v", OUTSIDE, [2], "float32")])
    run = RunDirectory.create(tmp_path / "run", manifest)
    (run.path / "blocks" / "outside.safetensors").mkdir()  # in the way
    with pytest.raises(UserError, match=r"outside\.safetensors could not be written.*--resume"):
        run.write_part(OUTSIDE, {"v": torch.zeros(2)}, {})
    assert list(contents(tmp_path)) == ["run/manifest.json"]
    assert not run.is_complete(OUTSIDE)


def raised_from(error: Exception, cause: Exception) -> Exception:
    try:
        raise error from cause
    except type(error) as found:
        return found


@pytest.mark.parametrize(
    ("error", "full", "trouble"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), True, True),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), True, True),
        (OSError(errno.EFBIG, os.strerror(errno.EFBIG)), False, True),  # of FAT, say: the disk may have room
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), False, True),
        (OSError(errno.ENOENT, os.strerror(errno.ENOENT)), False, False),
        (SafetensorError("I/O error: No space left on device (os error 28)"), True, True),
        (SafetensorError("header too large"), False, False),
        (OSError("100000 requested and 0 written"), True, True),  # numpy's, of a write that the disk cut short
        (raised_from(UserError("not written"), OSError(errno.ENOSPC, "full")), True, True),
        (raised_from(UserError("not written"), OSError(errno.EACCES, "no")), False, False),
    ],
)
def test_what_an_error_says_of_the_disk(error: Exception, full: bool, trouble: bool) -> None:
    assert (is_disk_full(error), is_disk_trouble(error)) == (full, trouble)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_numpy_on_a_full_disk_is_known_for_what_it_is() -> None:
    with pytest.raises(OSError, match="requested") as found:
        np.zeros(100_000).tofile("/dev/full")
    assert is_disk_full(found.value)
