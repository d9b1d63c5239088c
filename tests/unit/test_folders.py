"""Output folders: what is refused, what is replaced, what is never touched, and who works there."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from deepfusion import folders
from deepfusion.errors import InputError, no_access

KEY, OTHER = "a" * 64, "b" * 64


def refusal(call, *arguments, **options) -> str:
    with pytest.raises(InputError) as error:
        call(*arguments, **options)
    return error.value.code


AS_A_USER = """
import os, shutil, sys
from pathlib import Path
from deepfusion import folders
from deepfusion.errors import InputError
if os.geteuid() == 0:  # to whom permissions do not apply
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
"""


def as_a_user(code: str, folder: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a folder, as somebody to whom permissions apply."""
    line = [sys.executable, "-c", AS_A_USER + textwrap.dedent(code)]
    return subprocess.run(line, capture_output=True, text=True, check=False, cwd=folder)


@pytest.fixture
def shared() -> Iterator[str]:
    """A folder that every user can reach, unlike `tmp_path`."""
    with tempfile.TemporaryDirectory() as folder:
        yield folder


# What may be written


@pytest.mark.parametrize(
    "name",
    [".", "..", "/", "~", "clinic/..", "clinic/../../here", "file", "file/out", "nowhere", "nowhere/out"],
)
def test_places_that_are_refused(tmp_path, monkeypatch, name):
    here = tmp_path / "here"
    (here / "clinic").mkdir(parents=True)
    (here / "file").write_text("mine")
    (here / "nowhere").symlink_to(here / "gone")
    monkeypatch.chdir(here)
    before = sorted(tmp_path.rglob("*"))
    assert refusal(folders.place, Path(os.path.expanduser(name))) == "bad-out"
    assert sorted(tmp_path.rglob("*")) == before


def test_a_link_is_followed_and_a_loop_is_not(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    assert folders.place(tmp_path / "link" / "out") == tmp_path / "disk" / "out"
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert refusal(folders.place, tmp_path / "loop") == "bad-out"


def test_no_input_in_the_output_and_no_output_in_an_input(tmp_path):
    data = tmp_path / "clinic" / "deep" / "private.jsonl"
    data.parent.mkdir(parents=True)
    data.write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "clinic")
    for out in ("clinic", "clinic/deep", "link", "link/deep/../.."):
        assert refusal(folders.place, tmp_path / out, [data]) == "input-in-out"
    assert refusal(folders.place, tmp_path / "clinic" / "run", [tmp_path / "link"]) == "input-in-out"
    assert folders.place(tmp_path / "clinic" / "out", [data]) == tmp_path / "clinic" / "out"


def test_a_place_that_cannot_be_written_is_said_before_any_work(shared):
    Path(shared).chmod(0o555)
    done = as_a_user(
        """
        for claim in (folders.place, folders.claim_run, lambda path: folders.claim_file(path, bool)):
            try:
                claim(Path("out"))
            except InputError as error:
                print(error.code)
        """,
        shared,
    )
    assert done.stdout.split() == ["bad-out"] * 3, done.stderr


@pytest.mark.parametrize(
    "name", ["manifest.json", "config.yaml", "log.txt", "federation/notes", "uploads/a", "photo.jpg"]
)
def test_names_alone_make_no_run_folder(tmp_path, name):
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text('{"name": "a web app"}')
    assert refusal(folders.claim_run, tmp_path / "out") == "not-a-run"


def test_run_folders_that_are_taken(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / folders.LOCK).touch()
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "manifest.json").write_text('{"stages": {}}')
    (tmp_path / "ours" / "notes.txt").write_text("what I saw")
    for name in ("new", "empty", "ours"):
        assert folders.claim_run(tmp_path / name) == tmp_path / name
    monkeypatch.chdir(tmp_path / "ours")
    assert folders.claim_run(Path()) == tmp_path / "ours"  # an earlier output may well be where one stands
    (tmp_path / "empty" / folders.LOCK).write_text("of another program")
    assert refusal(folders.claim_run, tmp_path / "empty") == "not-a-run"


def test_only_an_earlier_output_is_overwritten(tmp_path):
    page = tmp_path / "page.md"

    def claim() -> Path:
        return folders.claim_file(page, lambda text: text.startswith("# Results"))

    assert claim() == page
    page.write_text("# Results\n")
    assert claim() == page
    page.write_text("# My thesis\n")
    assert refusal(claim) == "not-ours"
    page.write_bytes(b"\xff\xfe\x00")
    assert refusal(claim) == "not-ours"
    page.unlink()
    page.mkdir()
    assert refusal(claim) == "bad-out"


# How it comes to be whole


def test_a_file_is_the_old_one_or_the_new_one(tmp_path):
    path = tmp_path / "facts.json"
    (tmp_path / ".facts.json.part").write_text("somebody's")
    folders.write_whole(path, "old")
    with pytest.raises(UnicodeEncodeError):
        folders.write_whole(path, "\ud800")
    assert path.read_text() == "old"
    folders.write_whole(path, b"new", 0o600)
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"new", 0o600)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".facts.json.part", "facts.json"]


def test_a_folder_is_whole_or_not_there(tmp_path):
    target = tmp_path / "out"

    def fail() -> None:
        with folders.whole_folder(target) as part:
            (part / "half").write_text("")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not list(tmp_path.iterdir())
    target.mkdir()
    with folders.whole_folder(target) as part:
        (part / "all").write_text("")
        assert not list(target.iterdir())
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*")] == [Path("out"), Path("out/all")]


def test_what_came_meanwhile_is_not_replaced(tmp_path):
    target = tmp_path / "out"

    def write() -> None:
        with folders.whole_folder(target) as part:
            (part / "all").write_text("")
            target.mkdir()
            (target / "mine").write_text("mine")

    assert refusal(write) == "not-ours"
    assert [path.name for path in target.iterdir()] == ["mine"]
    (tmp_path / "made").mkdir()
    (tmp_path / "file").write_text("mine")
    assert refusal(folders.put, tmp_path / "made", tmp_path / "file") == "not-ours"
    assert (tmp_path / "file").read_text() == "mine"


def test_copies_are_ours_whatever_the_permissions_of_what_was_copied(shared):
    Path(shared).chmod(0o777)
    done = as_a_user(
        """
        source = Path("given", "ward")
        (source / "deep").mkdir(parents=True)
        (source / "card.json").write_text("{}")
        (source / "deep" / "file").write_text("deep")
        (source / "link").symlink_to("/etc/passwd")
        os.mkfifo(source / "pipe")
        for path in (source / "card.json", source / "deep" / "file"):
            path.chmod(0o444)
        for path in (source / "deep", source, Path("given")):
            path.chmod(0o555)
        for _ in range(2):  # a copy that was cut short is made again
            folders.copy_folder(Path("given"), Path("copy"))
        assert Path("copy/ward/link").is_symlink() and Path("copy/ward/pipe").is_fifo()
        assert Path("copy/ward/deep/file").read_text() == "deep"
        folders.remove(Path("copy"))
        assert not Path("copy").exists()
        folders.remove(Path("given"))  # of read-only folders that are ours
        assert not Path("given").exists()
        """,
        shared,
    )
    assert done.returncode == 0, done.stderr


def test_removing_does_not_follow_links(tmp_path):
    (tmp_path / "mine").mkdir(mode=0o500)
    work = tmp_path / "work"
    folders.open_work(work, KEY)
    (work / "link").symlink_to(tmp_path / "mine")
    folders.remove(work)
    assert (tmp_path / "mine").stat().st_mode & 0o777 == 0o500


# Work folders


def test_a_work_folder_goes_on_for_the_same_request_only(tmp_path):
    work = tmp_path / "work"
    assert not folders.open_work(work, KEY)
    (work / "half").write_text("")
    assert folders.open_work(work, KEY)
    assert (work / "half").exists()
    assert not folders.open_work(work, KEY, anew=True)
    assert not (work / "half").exists()
    (work / "half").write_text("")
    assert not folders.open_work(work, OTHER)
    assert not (work / "half").exists()


@pytest.mark.parametrize("left", [None, "", "aaaa"])
def test_a_work_folder_of_a_run_that_was_killed_as_it_began(tmp_path, left):
    (tmp_path / "work").mkdir()
    if left is not None:
        (tmp_path / "work" / "key").write_text(left)
    assert not folders.open_work(tmp_path / "work", KEY)
    assert folders.work_key(tmp_path / "work") == KEY


@pytest.mark.parametrize("name", ["notes.txt", "key/mine", "key"])
def test_a_work_folder_of_somebody_else_is_left_alone(tmp_path, name):
    path = tmp_path / "work" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine\n")
    assert refusal(folders.open_work, tmp_path / "work", KEY) == "not-ours"
    assert path.read_text() == "mine\n"


@pytest.mark.parametrize("kind", ["file", "link"])
def test_no_work_in_what_is_no_folder(tmp_path, kind):
    (tmp_path / "mine").mkdir()
    if kind == "link":
        (tmp_path / "work").symlink_to(tmp_path / "mine")
    else:
        (tmp_path / "work").write_text("mine")
    assert refusal(folders.open_work, tmp_path / "work", KEY) == "not-ours"
    assert list((tmp_path / "mine").iterdir()) == []


def test_a_folder_answers_one_request(tmp_path):
    folders.bind(tmp_path / "out", KEY, tmp_path / "out" / "moe")
    (tmp_path / "out" / "moe").mkdir()
    folders.bind(tmp_path / "out", KEY, tmp_path / "out" / "moe")
    assert refusal(folders.bind, tmp_path / "out", OTHER, tmp_path / "out" / "moe") == "another-run"
    (tmp_path / "out" / "key").unlink()
    assert refusal(folders.bind, tmp_path / "out", KEY, tmp_path / "out" / "moe") == "another-run"


# Who works there


def test_one_process_at_a_time(tmp_path):
    code = f"""
    from pathlib import Path
    from deepfusion.folders import locked
    with locked(Path({str(tmp_path / "lock")!r})):
        print("in", flush=True)
        sys.stdin.readline()
    """
    lines = "import sys\n" + textwrap.dedent(code)
    busy = InputError("busy", code="run-busy")
    with subprocess.Popen(
        [sys.executable, "-c", lines], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "in\n"
        with pytest.raises(InputError, match="busy"), folders.locked(tmp_path / "lock", busy):
            pass
        other.communicate("\n")
    with folders.locked(tmp_path / "lock", busy):
        pass


# What the system refuses


def test_what_the_system_refuses_names_the_place():
    full = no_access(OSError(28, "No space left on device"), "runs/x")
    assert full is not None
    assert str(full).startswith("runs/x: No space left on device")
    denied = no_access(PermissionError(13, "Permission denied", "/etc/shadow"))
    assert denied is not None
    assert (denied.where, denied.code) == ("/etc/shadow", "no-access")
    assert no_access(RuntimeError("I/O error: No space left on device (os error 28)")) is not None
    for defect in (FileNotFoundError(2, "No such file", "x"), KeyError("x"), OSError("odd")):
        assert no_access(defect) is None
