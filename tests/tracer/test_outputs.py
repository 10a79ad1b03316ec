from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from latrace.tracer.errors import LatraceError, UsageError
from latrace.tracer.outputs import (
    Caller,
    acting_as,
    calling_user,
    create_output_dir,
    open_output_file,
    open_output_folder,
    write_error,
)

NOBODY = 65534


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty directory, as nobody's helper."""
    monkeypatch.delenv("SUDO_UID", raising=False)
    monkeypatch.delenv("SUDO_GID", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def as_nobody(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Root, called through sudo by `nobody`, in a directory of nobody's."""
    directory = Path(tempfile.mkdtemp(prefix="latrace-test-"))
    os.chown(directory, NOBODY, NOBODY)
    monkeypatch.setenv("SUDO_UID", str(NOBODY))
    monkeypatch.setenv("SUDO_GID", str(NOBODY))
    monkeypatch.chdir(directory)
    yield directory
    shutil.rmtree(directory)


def record(path: Path | None = None, *, force: bool = False, content: bytes = b"{}") -> Path:
    with create_output_dir(path, force=force) as out:
        out.replace("manifest.json", content)
        with out.open_new("waits.arrows") as file:
            file.write(b"rows")
        return out.path


def tree(path: Path) -> dict[str, bytes | None]:
    """Everything below a directory: content of files, None for directories."""
    return {
        str(entry.relative_to(path)): entry.read_bytes() if entry.is_file() else None
        for entry in sorted(path.rglob("*"))
    }


# --- names and modes -----------------------------------------------------------------------------


def test_modes_do_not_depend_on_the_umask(here: Path) -> None:
    old = os.umask(0)
    try:
        made = record()
    finally:
        os.umask(old)
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in made.iterdir()} == {0o600}
    assert made == here / "latrace.data"


def test_the_default_moves_the_earlier_one_aside(here: Path) -> None:
    for content in (b"1", b"2", b"3"):
        record(content=content)
    assert (here / "latrace.data" / "manifest.json").read_bytes() == b"3"
    assert (here / "latrace.data.old" / "manifest.json").read_bytes() == b"2"
    assert sorted(entry.name for entry in here.iterdir()) == ["latrace.data", "latrace.data.old"]


def test_an_empty_directory_counts_as_a_capture(here: Path) -> None:
    (here / "latrace.data").mkdir()
    record()
    assert (here / "latrace.data.old").is_dir()


def test_a_name_that_exists_is_refused_without_force(here: Path) -> None:
    record(Path("mine"), content=b"1")
    with pytest.raises(UsageError, match="exists") as caught:
        record(Path("mine"), content=b"2")
    assert "--force" in caught.value.hint
    assert (here / "mine" / "manifest.json").read_bytes() == b"1"
    record(Path("mine"), content=b"2", force=True)
    assert (here / "mine" / "manifest.json").read_bytes() == b"2"
    assert not (here / "mine.old").exists()


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("name", [None, "mine"])
@pytest.mark.parametrize(
    "content",
    [
        {"notes.txt": b"mine"},
        {"manifest.json": b"{}", "notes.txt": b"mine"},
        {"waits.arrows": b"no manifest beside it"},
        {"manifest.json": b"{}", "deeper/waits.arrows": b"mine"},
        {"manifest.json/waits.arrows": b"mine"},
    ],
)
def test_what_does_not_look_like_a_capture_stays(
    here: Path, name: str | None, force: bool, content: dict[str, bytes]
) -> None:
    directory = here / (name or "latrace.data")
    for file, data in content.items():
        (directory / file).parent.mkdir(parents=True, exist_ok=True)
        (directory / file).write_bytes(data)
    before = tree(here)
    with pytest.raises(LatraceError) as caught:
        record(Path(name) if name else None, force=force)
    assert caught.value.hint
    assert tree(here) == before


def test_an_old_capture_with_foreign_files_is_not_removed(here: Path) -> None:
    record()
    record()
    (here / "latrace.data.old" / "notes.txt").write_text("mine")
    before = tree(here)
    with pytest.raises(LatraceError, match=r"notes\.txt"):
        record()
    assert tree(here) == before


def test_a_file_in_the_way_is_refused(here: Path) -> None:
    (here / "latrace.data").write_text("mine")
    with pytest.raises(LatraceError, match="not a directory"):
        record()
    with pytest.raises(LatraceError, match="not a directory"):
        record(Path("latrace.data"), force=True)
    assert (here / "latrace.data").read_text() == "mine"


@pytest.mark.parametrize("name", ["..", ".", "/", "a/.."])
def test_names_that_are_none(here: Path, name: str) -> None:
    assert here
    with pytest.raises(UsageError, match="cannot be a name"):
        create_output_dir(Path(name), force=True)


def test_a_capture_being_written_is_left_alone(here: Path) -> None:
    with create_output_dir(None, force=False) as out:
        out.replace("manifest.json", b"1")
        with pytest.raises(LatraceError, match="being written by another latrace"):
            record()
        with pytest.raises(LatraceError, match="being written by another latrace"):
            record(Path("latrace.data"), force=True)
        assert tree(here) == {"latrace.data": None, "latrace.data/manifest.json": b"1"}
    record(content=b"2")


def test_a_file_is_made_only_once(here: Path) -> None:
    assert here
    with create_output_dir(None, force=False) as out:
        out.open_new("waits.arrows").close()
        with pytest.raises(LatraceError, match="the name is taken"):
            out.open_new("waits.arrows")


def test_replace_leaves_no_temporary_file(here: Path) -> None:
    with create_output_dir(None, force=False) as out:
        out.replace("manifest.json", b"1")
        out.replace("manifest.json", b"2")
    assert tree(here / "latrace.data") == {"manifest.json": b"2"}


# --- links ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("name", [None, "mine"])
def test_a_link_in_place_of_a_capture_is_refused(here: Path, name: str | None, force: bool) -> None:
    victim = record(Path("victim"))
    (here / (name or "latrace.data")).symlink_to(victim)
    before = tree(here)
    with pytest.raises(LatraceError):
        record(Path(name) if name else None, force=force)
    assert tree(here) == before


def test_a_link_in_place_of_the_old_capture_is_refused(here: Path) -> None:
    victim = record(Path("victim"))
    record()
    (here / "latrace.data.old").symlink_to(victim)
    before = tree(here)
    with pytest.raises(LatraceError):
        record()
    assert tree(here) == before


@pytest.mark.parametrize("inside", ["manifest.json", "waits.arrows"])
def test_links_inside_a_capture_keep_it_from_being_removed(here: Path, inside: str) -> None:
    (here / "precious").write_text("precious")
    mine = record(Path("mine"))
    (mine / inside).unlink()
    (mine / inside).symlink_to(here / "precious")
    before = tree(here)
    with pytest.raises(LatraceError, match=f"did not write: '{inside}'"):
        record(Path("mine"), force=True)
    assert tree(here) == before


def test_links_that_appear_while_recording_are_not_followed(here: Path) -> None:
    (here / "precious").write_text("precious")
    with create_output_dir(None, force=False) as out:
        (out.path / "manifest.json").symlink_to(here / "precious")
        (out.path / "waits.arrows").symlink_to(here / "precious")
        (out.path / "hist.arrows").symlink_to(here / "not there yet")
        out.replace("manifest.json", b"new")
        with pytest.raises(LatraceError):
            out.open_new("waits.arrows")
        with pytest.raises(LatraceError):
            out.open_new("hist.arrows")
        assert (out.path / "manifest.json").read_bytes() == b"new"
    assert (here / "precious").read_text() == "precious"
    assert not (here / "not there yet").exists()


def test_a_directory_that_is_exchanged_keeps_our_files(here: Path) -> None:
    """We hold the directory, not its name."""
    with create_output_dir(None, force=False) as out:
        out.path.rename(here / "moved")
        (here / "victim").mkdir()
        (here / "latrace.data").symlink_to(here / "victim")
        out.replace("manifest.json", b"{}")
        out.open_new("waits.arrows").close()
    assert sorted(entry.name for entry in (here / "moved").iterdir()) == [
        "manifest.json",
        "waits.arrows",
    ]
    assert not list((here / "victim").iterdir())


# --- single files --------------------------------------------------------------------------------


def test_an_output_file_appears_when_it_is_whole(here: Path) -> None:
    with open_output_file(Path("out.svg"), force=False) as file:
        file.write(b"half")
        assert not (here / "out.svg").exists()
        file.write(b" whole")
    assert (here / "out.svg").read_bytes() == b"half whole"
    assert stat.S_IMODE((here / "out.svg").stat().st_mode) == 0o600


def test_a_failure_leaves_the_old_file_and_nothing_else(here: Path) -> None:
    (here / "out.svg").write_text("old")
    with (
        pytest.raises(RuntimeError, match="mine"),
        open_output_file(Path("out.svg"), force=True) as file,
    ):
        file.write(b"half")
        raise RuntimeError("mine")
    assert tree(here) == {"out.svg": b"old"}


def test_an_error_of_the_callers_own_is_not_explained_away(here: Path) -> None:
    with (
        pytest.raises(FileNotFoundError),
        open_output_file(Path("out.svg"), force=False),
    ):
        (here / "nowhere").read_bytes()
    assert tree(here) == {}


def test_an_output_file_that_exists_needs_force(here: Path) -> None:
    (here / "out.svg").write_text("old")
    with (
        pytest.raises(UsageError, match="exists"),
        open_output_file(Path("out.svg"), force=False),
    ):
        pytest.fail("was opened")
    with open_output_file(Path("out.svg"), force=True) as file:
        file.write(b"new")
    assert tree(here) == {"out.svg": b"new"}


@pytest.mark.parametrize("kind", ["link", "directory", "fifo"])
def test_an_output_file_replaces_regular_files_only(here: Path, kind: str) -> None:
    (here / "precious").write_text("precious")
    out = here / "out.svg"
    if kind == "link":
        out.symlink_to(here / "precious")
    elif kind == "directory":
        out.mkdir()
    else:
        os.mkfifo(out)
    with (
        pytest.raises(UsageError, match="not a regular file"),
        open_output_file(out, force=True),
    ):
        pytest.fail("was opened")
    assert (here / "precious").read_text() == "precious"
    assert len(list(here.iterdir())) == 2


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "cause"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EFBIG, "file-size limit"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permission denied"),
        (errno.ELOOP, "symbolic link"),
        (errno.ENOENT, "no such directory"),
        (errno.ENAMETOOLONG, "too long"),
    ],
)
def test_every_error_has_a_cause_and_a_remedy(number: int, cause: str) -> None:
    error = write_error(Path("/x"), OSError(number, os.strerror(number)))
    assert error.cause.startswith("cannot write /x: ")
    assert cause in error.cause
    assert error.hint
    assert error.exit_code == 1


def test_a_missing_parent(here: Path) -> None:
    assert here
    with pytest.raises(LatraceError, match="no such directory"):
        create_output_dir(Path("nowhere/mine"), force=False)


# --- behind sudo ---------------------------------------------------------------------------------


def test_who_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.delenv("SUDO_UID", raising=False)
    assert calling_user() is None
    monkeypatch.setenv("SUDO_UID", "0")
    monkeypatch.setenv("SUDO_GID", "0")
    assert calling_user() is None
    monkeypatch.setenv("SUDO_UID", "4000000000")
    monkeypatch.setenv("SUDO_GID", "77")
    assert calling_user() == Caller(4000000000, 77, (77,))
    for uid, gid in (("x", "1"), ("4000000000", "-1"), ("-5", "1")):
        monkeypatch.setenv("SUDO_UID", uid)
        monkeypatch.setenv("SUDO_GID", gid)
        with pytest.raises(UsageError):
            calling_user()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert calling_user() is None


@pytest.mark.kernel
def test_files_belong_to_who_typed_sudo(as_nobody: Path) -> None:
    record()
    record()
    with open_output_file(Path("out.svg"), force=False) as file:
        file.write(b"x")
    for entry in as_nobody.rglob("*"):
        assert (entry.stat().st_uid, entry.stat().st_gid) == (NOBODY, NOBODY), entry


@pytest.mark.kernel
def test_root_does_not_write_where_the_caller_may_not(as_nobody: Path) -> None:
    for parent in ("/etc", "/root", "/"):
        with pytest.raises(LatraceError, match="permission denied"):
            record(Path(parent) / "latrace-test.data")
        with (
            pytest.raises(LatraceError, match="permission denied"),
            open_output_file(Path(parent) / "latrace-test.svg", force=True),
        ):
            pytest.fail("was opened")
    assert not list(Path("/etc").glob("latrace-test*"))
    assert tree(as_nobody) == {}


@pytest.mark.kernel
def test_root_does_not_remove_what_the_caller_may_not(as_nobody: Path) -> None:
    """A capture of root's, in root's directory: --force is of no use."""
    directory = Path(tempfile.mkdtemp(prefix="latrace-test-"))
    try:
        directory.chmod(0o755)
        victim = directory / "victim"
        victim.mkdir(mode=0o755)
        (victim / "manifest.json").write_text("{}")
        before = tree(directory)
        with pytest.raises(LatraceError, match="permission denied"):
            record(victim, force=True)
        (as_nobody / "link").symlink_to(directory)
        with pytest.raises(LatraceError, match="permission denied"):
            record(Path("link/victim"), force=True)
        assert tree(directory) == before
    finally:
        shutil.rmtree(directory)


@pytest.mark.kernel
@pytest.mark.parametrize("target", ["/etc", "/root"])
def test_a_hostile_link_named_latrace_data(as_nobody: Path, target: str) -> None:
    before = sorted(os.listdir(target))  # noqa: PTH208 - names are all that is wanted
    (as_nobody / "latrace.data").symlink_to(target)
    for path, force in ((None, False), (None, True), (Path("latrace.data"), True)):
        with pytest.raises(LatraceError):
            record(path, force=force)
    assert sorted(os.listdir(target)) == before  # noqa: PTH208
    assert (as_nobody / "latrace.data").is_symlink()


@pytest.mark.kernel
def test_a_hostile_link_named_manifest(as_nobody: Path) -> None:
    """Root's rights open it, the caller's do not; it is not even tried."""
    secret = Path(tempfile.mkdtemp(prefix="latrace-test-")) / "secret"
    secret.write_text("secret")
    try:
        mine = as_nobody / "latrace.data"
        mine.mkdir()
        os.chown(mine, NOBODY, NOBODY)
        (mine / "manifest.json").symlink_to(secret)
        for path, force in ((None, False), (Path("latrace.data"), True)):
            with pytest.raises(LatraceError):
                record(path, force=force)
        shutil.rmtree(mine)
        with create_output_dir(None, force=False) as out:
            (mine / "manifest.json").symlink_to(secret)
            out.replace("manifest.json", b"ours")
        assert secret.read_text() == "secret"
    finally:
        shutil.rmtree(secret.parent)


@pytest.mark.kernel
def test_rights_come_back_and_other_threads_keep_theirs() -> None:
    def ids() -> list[str]:
        status = Path(f"/proc/self/task/{threading.get_native_id()}/status").read_text()
        wanted = ("Uid:", "Gid:", "Groups:", "CapEff:")
        return [" ".join(line.split()) for line in status.splitlines() if line.startswith(wanted)]

    before = ids()
    asked, told = threading.Event(), threading.Event()
    seen: list[list[str]] = []

    def other() -> None:
        asked.wait(10)
        seen.append(ids())
        told.set()

    thread = threading.Thread(target=other)
    thread.start()
    with pytest.raises(RuntimeError), acting_as(Caller(NOBODY, NOBODY, (NOBODY, 7))):
        asked.set()
        assert told.wait(10)
        inside = ids()
        raise RuntimeError
    thread.join()
    assert seen == [before]
    assert inside[0] == f"Uid: 0 0 0 {NOBODY}"
    assert inside[1] == f"Gid: 0 0 0 {NOBODY}"
    assert inside[2] == f"Groups: 7 {NOBODY}"
    assert inside[3] != before[3]
    assert ids() == before


@pytest.mark.kernel
def test_the_groups_of_the_caller_count_and_roots_do_not(as_nobody: Path) -> None:
    shared = as_nobody / "shared"
    shared.mkdir()
    os.chown(shared, 0, os.getegid())
    shared.chmod(0o770)
    with pytest.raises(PermissionError), acting_as(Caller(NOBODY, NOBODY, (NOBODY,))):
        (shared / "x").touch()
    os.chown(shared, 0, 4242)
    with acting_as(Caller(NOBODY, NOBODY, (NOBODY, 4242))):
        (shared / "x").touch()
    assert (shared / "x").stat().st_uid == NOBODY
    (shared / "y").touch()  # root again
    assert (shared / "y").stat().st_uid == 0


# --- a directory of captures ---------------------------------------------------------------------


def test_a_folder_of_captures_touches_only_what_it_is_told_is_ours(here: Path) -> None:
    folder = open_output_folder(Path("many"), files=re.compile(r"extra\.json"))
    own = re.compile(r"mine-\d")
    made = folder.make("mine-1", {"manifest.json": b"{}"})
    assert made is not None and made.path == here / "many" / "mine-1"
    assert folder.make("mine-1", {}) is None
    assert tree(here / "many") == {"mine-1": None, "mine-1/manifest.json": b"{}"}
    made.replace("extra.json", b"{}" * 5000)
    (here / "many" / "theirs").mkdir()
    assert folder.names(own) == ["mine-1"]
    size = folder.weigh("mine-1")
    assert size is not None and size >= 10_000
    assert folder.weigh("mine-2") is None
    assert not folder.remove("mine-1")  # it is being written
    made.close()
    (made.path / "other.json").touch()
    with pytest.raises(LatraceError, match=r"did not write: 'other\.json'"):
        folder.remove("mine-1")
    (made.path / "other.json").unlink()
    assert folder.remove("mine-1")
    assert not folder.remove("mine-1")
    assert tree(here / "many") == {"theirs": None}
    assert not folder.is_removed()
    shutil.rmtree(here / "many")
    assert folder.is_removed()
    with pytest.raises(LatraceError, match="no such directory"):
        folder.make("mine-1", {})
    folder.close()
