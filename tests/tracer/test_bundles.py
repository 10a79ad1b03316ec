"""The directory of bundles: names, limits, and that nothing but bundles is ever touched."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latrace.analysis.schema import SCHEMA_VERSION
from latrace.tracer import outputs
from latrace.tracer.errors import LatraceError, UsageError
from latrace.tracer.outputs import OutputDir
from latrace.tracer.watch.bundles import Bundles, Tidied, write_spike

NOBODY = 65534
FIRED_NS = 1_795_260_725_000_000_000  # 2026-11-21 11:32:05 UTC
PLENTY = 1 << 40


@pytest.fixture(autouse=True)
def without_sudo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SUDO_UID", raising=False)
    monkeypatch.delenv("SUDO_GID", raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "spikes"


def fill(out: OutputDir, *, size: int = 0) -> str:
    """Write what a bundle holds, and close it."""
    with out:
        out.replace("manifest.json", b"{}")
        with out.open_new("waits.arrows") as file:
            file.write(b"x" * size)
        for name in ("report.html", "pprof-cpu.pb.gz", "pprof-heap.txt", "pprof-trace.out"):
            out.replace(name, b"")
        write_spike(out, {"schema": 1})
    return out.path.name


def make(bundles: Bundles, seconds: int = 0, *, size: int = 0) -> str:
    return fill(bundles.new(FIRED_NS + seconds * 10**9, {}), size=size)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def removed(tidied: Tidied) -> list[str]:
    return [one.path.name for one in tidied.removed]


# --- making --------------------------------------------------------------------------------------


def test_a_bundle_is_named_by_its_moment_in_utc(folder: Path) -> None:
    old = os.umask(0)
    try:
        bundles = Bundles(folder, keep=9, disk_bytes=PLENTY)
        made = [make(bundles) for _ in range(3)]
    finally:
        os.umask(old)
    assert made == [f"spike-20261121-113205{end}" for end in ("", "-2", "-3")]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for name in made:
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o700
        assert {stat.S_IMODE(file.stat().st_mode) for file in (folder / name).iterdir()} == {0o600}


@pytest.mark.parametrize("kind", ["file", "link", "directory"])
def test_a_name_that_is_taken_by_anything_is_passed_over(folder: Path, kind: str) -> None:
    bundles = Bundles(folder, keep=9, disk_bytes=PLENTY)
    taken = folder / "spike-20261121-113205"
    if kind == "file":
        taken.touch()
    elif kind == "link":
        taken.symlink_to("/etc")
    else:
        taken.mkdir()
    assert make(bundles) == "spike-20261121-113205-2"


def test_a_new_one_has_its_first_manifest(folder: Path) -> None:
    with Bundles(folder, keep=9, disk_bytes=PLENTY).new(FIRED_NS, {"host": "h"}) as out:
        assert names(out.path) == ["manifest.json"]
        told = json.loads((out.path / "manifest.json").read_bytes())
        assert told == {"schema": SCHEMA_VERSION, "host": "h", "complete": False}
        assert stat.S_IMODE((out.path / "manifest.json").stat().st_mode) == 0o600


@pytest.mark.parametrize("kind", ["file", "link", "directory"])
def test_a_name_that_is_taken_meanwhile_is_passed_over(
    folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    bundles = Bundles(folder, keep=9, disk_bytes=PLENTY)
    taken = folder / "spike-20261121-113205"
    real = outputs._write_new

    def write(directory: int, name: str, data: bytes) -> None:
        monkeypatch.undo()
        real(directory, name, data)
        if kind == "file":
            taken.touch()
        elif kind == "link":
            taken.symlink_to("/etc")
        else:
            taken.mkdir()
            (taken / "manifest.json").touch()

    monkeypatch.setattr(outputs, "_write_new", write)
    assert make(bundles) == "spike-20261121-113205-2"
    assert names(folder) == ["spike-20261121-113205", "spike-20261121-113205-2"]


@pytest.mark.parametrize("step", ["hold", "write", "rename", "exchange"])
def test_nothing_is_left_of_one_that_cannot_be_made(
    folder: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    bundles = Bundles(folder, keep=9, disk_bytes=PLENTY)
    descriptors = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    real_write, real_rename = outputs._write_new, os.rename

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def half(directory: int, name: str, data: bytes) -> None:
        real_write(directory, name, data[:5])
        full()

    def exchange(old: str, new: str, **where: int) -> None:
        real_rename(old, new, **where)
        real_rename(folder / new, folder.with_name("theirs"))

    monkeypatch.setattr(
        *{
            "hold": (outputs, "_hold_new", full),
            "write": (outputs, "_write_new", half),
            "rename": (os, "rename", full),
            "exchange": (os, "rename", exchange),
        }[step]
    )
    words = "was exchanged" if step == "exchange" else "the disk is full"
    with pytest.raises(LatraceError, match=words):
        bundles.new(FIRED_NS, {})
    assert names(folder) == []
    assert len(os.listdir("/proc/self/fd")) == descriptors  # noqa: PTH208
    monkeypatch.undo()
    assert make(bundles) == "spike-20261121-113205"


KILLED = """
import json, os, random, signal, sys, time
from pathlib import Path
from latrace.tracer.watch.bundles import NAME, Bundles

folder, kills, fired_ns = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
chance = random.Random(7)
bundles = Bundles(folder, keep=1, disk_bytes=0)
bundles.new(fired_ns, {}).close()  # what it imports is there before anyone forks
named = halves = 0
for number in range(1, kills + 1):
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.write(writer, b"r")
        for step in range(10**6):
            bundles.new(fired_ns + (number * 1000 + step) * 10**9, {"words": "x" * 5000}).close()
    os.read(reader, 1)
    time.sleep(chance.random() * 0.002)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    os.close(reader), os.close(writer)
    for entry in folder.iterdir():
        if NAME.fullmatch(entry.name):
            named += 1
            assert json.loads((entry / "manifest.json").read_bytes())["complete"] is False, entry
        else:
            halves += 1
            assert entry.name.startswith(".latrace."), entry
    assert bundles.tidy().notes == ()
    left = [entry.name for entry in folder.iterdir()]
    assert len(left) <= 2 and all(map(NAME.fullmatch, left)), left
print(named, halves)
"""


def test_killed_at_any_moment_there_is_a_manifest_or_no_bundle(folder: Path) -> None:
    words = (sys.executable, "-c", KILLED, str(folder), "250", str(FIRED_NS))
    ended = subprocess.run(words, check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    named, halves = map(int, ended.stdout.split())
    assert named > 250 and halves > 10


def test_spike_json_is_plain_ascii(folder: Path) -> None:
    with Bundles(folder, keep=1, disk_bytes=PLENTY).new(FIRED_NS, {}) as out:
        document = {"schema": 1, "reason": "\u20ac \x1b[2J \udc80"}
        write_spike(out, document)
        raw = (out.path / "spike.json").read_bytes()
        assert raw.isascii() and b"\x1b" not in raw
        assert json.loads(raw) == document


def test_a_directory_that_was_removed_is_made_again(folder: Path) -> None:
    bundles = Bundles(folder, keep=9, disk_bytes=PLENTY)
    make(bundles)
    shutil.rmtree(folder)
    assert bundles.tidy() == Tidied(removed=(), notes=())
    make(bundles, 1)
    assert names(folder) == ["spike-20261121-113206"]


def test_no_descriptor_is_left(folder: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    bundles = Bundles(folder, keep=2, disk_bytes=PLENTY)
    for number in range(10):
        make(bundles, number)
        bundles.tidy()
    shutil.rmtree(folder)
    make(bundles)
    bundles.close()
    bundles.close()
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


@pytest.mark.parametrize("what", ["link", "file", "nowhere", "no name"])
def test_a_directory_that_cannot_be_had(tmp_path: Path, what: str) -> None:
    path = tmp_path / "spikes"
    (tmp_path / "real").mkdir()
    if what == "link":
        path.symlink_to("real")
    elif what == "file":
        path.touch()
    elif what == "nowhere":
        path = tmp_path / "missing" / "spikes"
    else:
        path = tmp_path / ".."
    with pytest.raises(UsageError if what == "no name" else LatraceError) as caught:
        Bundles(path, keep=1, disk_bytes=1)
    expected = {
        "link": "a symbolic link is in the way",
        "file": "not a directory",
        "nowhere": "no such directory",
        "no name": "cannot be a name",
    }
    assert expected[what] in caught.value.cause and caught.value.hint
    assert not list((tmp_path / "real").iterdir())


# --- limits --------------------------------------------------------------------------------------


def test_the_oldest_go_until_so_many_are_left(folder: Path) -> None:
    bundles = Bundles(folder, keep=3, disk_bytes=PLENTY)
    made = [make(bundles, number) for number in range(5)]
    tidied = bundles.tidy()
    assert removed(tidied) == made[:2] and tidied.notes == ()
    assert all(one.size_bytes > 0 for one in tidied.removed)
    assert names(folder) == made[2:]
    assert bundles.tidy() == Tidied(removed=(), notes=())


def test_within_a_second_the_number_counts(folder: Path) -> None:
    bundles = Bundles(folder, keep=2, disk_bytes=PLENTY)
    made = [make(bundles) for _ in range(11)]
    assert removed(bundles.tidy()) == made[:9]
    assert names(folder) == sorted([made[9], made[10]])


@given(
    sizes=st.lists(st.integers(0, 300_000), min_size=1, max_size=7),
    keep=st.integers(1, 8),
    disk_bytes=st.integers(0, 900_000),
)
def test_what_is_left_fits_and_is_as_much_as_fits(
    sizes: list[int], keep: int, disk_bytes: int
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory) / "spikes"
        bundles = Bundles(folder, keep=keep, disk_bytes=disk_bytes)
        made = [make(bundles, number, size=size) for number, size in enumerate(sizes)]
        weights = [
            sum(
                max(entry.stat().st_size, entry.stat().st_blocks * 512)
                for entry in (folder / name, *(folder / name).iterdir())
            )
            for name in made
        ]
        gone = removed(bundles.tidy())
        left = len(made) - len(gone)
        assert gone == made[: len(gone)] and names(folder) == made[len(gone) :]
        assert left == 1 or (left <= keep and sum(weights[-left:]) <= disk_bytes)
        if gone:  # one more would have been too many, or too large
            assert left + 1 > keep or sum(weights[-left - 1 :]) > disk_bytes
        bundles.close()


def test_the_one_made_last_stays_though_its_name_is_older(folder: Path) -> None:
    """The clock was set back: it is the newest all the same."""
    bundles = Bundles(folder, keep=1, disk_bytes=0)
    future = make(bundles, 1_000_000)
    middle = make(bundles, 1)
    last = make(bundles)
    assert removed(bundles.tidy()) == [middle]
    assert names(folder) == sorted([last, future])


def test_one_that_is_being_written_stays_and_none_goes_for_it(folder: Path) -> None:
    """Two watches share a directory, and each its limit."""
    one, other = (Bundles(folder, keep=2, disk_bytes=PLENTY) for _ in range(2))
    writing = one.new(FIRED_NS, {})
    made = [make(other, number) for number in range(1, 4)]
    assert removed(other.tidy()) == made[:1]
    assert names(folder) == [writing.path.name, *made[1:]]
    fill(writing)
    assert removed(other.tidy()) == [writing.path.name]


def test_two_watches_that_tidy_at_once_remove_no_more_than_one_does(folder: Path) -> None:
    first = Bundles(folder, keep=200, disk_bytes=PLENTY)
    made = [make(first, number) for number in range(60)]
    watches = [Bundles(folder, keep=20, disk_bytes=PLENTY) for _ in range(2)]
    results: list[list[str]] = [[], []]
    barrier = threading.Barrier(2)

    def tidy(number: int) -> None:
        barrier.wait()
        results[number] = removed(watches[number].tidy())

    threads = [threading.Thread(target=tidy, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(itertools.chain(*results)) == made[:40]
    assert names(folder) == made[40:]


@pytest.mark.parametrize("moment", ["before it is opened", "before it is locked", "locked"])
def test_a_tidy_beside_new_never_costs_a_new_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Between making the directory and locking it, another watch may take it for half removed."""
    one, other = (Bundles(folder, keep=1, disk_bytes=0) for _ in range(2))
    old = make(one, -1)
    met: list[str] = []
    real_lock, real_hold = outputs._lock, outputs._hold_new

    def meanwhile() -> None:
        (made,) = set(names(folder)) - {old}
        met.append(made)
        monkeypatch.undo()

    def hold(parent: int, name: str, shown: Path) -> int:
        meanwhile()
        assert other.tidy() == Tidied(removed=(), notes=())
        return real_hold(parent, name, shown)

    def lock(fd: int, shown: Path) -> None:
        meanwhile()
        if moment == "before it is locked":
            assert other.tidy() == Tidied(removed=(), notes=())
            real_lock(fd, shown)
            return
        held = os.open(folder / met[0], os.O_RDONLY)  # another is about to remove it
        try:
            real_lock(held, shown)
            real_lock(fd, shown)
        finally:
            os.close(held)

    if moment == "before it is opened":
        monkeypatch.setattr(outputs, "_hold_new", hold)
    else:
        monkeypatch.setattr(outputs, "_lock", lock)
    with one.new(FIRED_NS, {}) as out:
        assert out.path.name == "spike-20261121-113205"
        (given_up,) = met
        assert given_up.startswith(".latrace.")
        assert (given_up in names(folder)) == (moment == "locked")
        assert removed(other.tidy()) == [old]
        assert names(folder) == [out.path.name]
        assert names(out.path) == ["manifest.json"]


def test_a_directory_that_others_always_remove(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = (Bundles(folder, keep=1, disk_bytes=0) for _ in range(2))
    real = outputs._hold_new

    def hold(parent: int, name: str, shown: Path) -> int:
        other.tidy()
        return real(parent, name, shown)

    monkeypatch.setattr(outputs, "_hold_new", hold)
    with pytest.raises(LatraceError, match="removed each time"):
        one.new(FIRED_NS, {})
    assert names(folder) == []


# --- what is not ours ----------------------------------------------------------------------------


def test_everything_else_is_left_alone_and_not_counted(folder: Path, tmp_path: Path) -> None:
    bundles = Bundles(folder, keep=1, disk_bytes=0)
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "manifest.json").write_text("{}")
    (folder / "spike-20200101-000000").symlink_to(victim)
    (folder / "spike-20200101-000001").write_text("a file")
    (folder / "spike-2020").mkdir()
    (folder / "spike-20200101-000000-0").mkdir()
    (folder / "spike-20200101-000000-02").mkdir()
    (folder / "spike-20200101-000000.bak").mkdir()
    (folder / "latrace.data").mkdir()
    (folder / ".latrace.svg.tmp").write_text("being written")
    (folder / "notes.txt").write_text("mine")
    before = names(folder)
    made = make(bundles)
    assert bundles.tidy() == Tidied(removed=(), notes=())
    assert names(folder) == sorted([*before, made])
    assert names(victim) == ["manifest.json"]


@pytest.mark.parametrize("kind", ["file", "directory", "link", "fifo", "link of ours", "many"])
def test_a_bundle_with_a_stranger_in_it_stays_and_is_told_of_once(folder: Path, kind: str) -> None:
    bundles = Bundles(folder, keep=1, disk_bytes=0)
    old = folder / make(bundles)
    stranger = old / "\x1b[2Jnotes"
    if kind == "file":
        stranger.write_text("mine")
    elif kind == "directory":
        (old / "deep.arrows").mkdir()
    elif kind == "link":
        stranger.symlink_to("/etc/passwd")
    elif kind == "fifo":
        os.mkfifo(old / "x.arrows")
    elif kind == "link of ours":
        (old / "report.html").unlink()
        (old / "report.html").symlink_to("/etc/passwd")
    else:
        for number in range(1001):
            (old / f"{number}.arrows").touch()
    before = names(old)
    middle, newest = make(bundles, 1), make(bundles, 2)
    tidied = bundles.tidy()
    assert removed(tidied) == [middle]
    (note,) = tidied.notes
    assert "holds what latrace did not write" in note and "\x1b" not in note
    assert names(folder) == [old.name, newest] and names(old) == before
    assert bundles.tidy() == Tidied(removed=(), notes=())
    shutil.rmtree(old)
    assert bundles.tidy() == Tidied(removed=(), notes=())


def test_a_bundle_that_vanishes_meanwhile(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundles = Bundles(folder, keep=1, disk_bytes=0)
    made = [make(bundles, number) for number in range(4)]
    listed = outputs.OutputFolder.names

    def then_gone(self: outputs.OutputFolder, *own: object) -> list[str]:
        found = listed(self, *own)  # type: ignore[arg-type]
        shutil.rmtree(folder / made[1])
        return found

    monkeypatch.setattr(outputs.OutputFolder, "names", then_gone)
    tidied = bundles.tidy()
    assert removed(tidied) == [made[0], made[2]] and tidied.notes == ()


def test_a_bundle_that_is_exchanged_for_a_link_while_it_is_removed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The owner of the directory plays with its names: what was opened is all that is emptied."""
    bundles = Bundles(folder, keep=1, disk_bytes=0)
    old, _ = make(bundles), make(bundles, 1)
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "manifest.json").write_text("precious")
    lock = outputs._lock

    def exchange(fd: int, shown: Path) -> None:
        lock(fd, shown)
        (folder / old).rename(tmp_path / "moved")
        (folder / old).symlink_to(victim)

    monkeypatch.setattr(outputs, "_lock", exchange)
    assert removed(bundles.tidy()) == []
    assert (victim / "manifest.json").read_text() == "precious"
    assert "manifest.json" in names(tmp_path / "moved")


def test_a_removal_that_was_cut_off_is_finished(folder: Path) -> None:
    """The name goes first: no half of a bundle is ever seen under its own."""
    bundles = Bundles(folder, keep=1, disk_bytes=0)
    old, new = make(bundles), make(bundles, 1)
    program = (
        "import os, sys; from pathlib import Path\n"
        "from latrace.tracer.watch.bundles import Bundles\n"
        "unlink = os.unlink\n"
        "def stop(*args, **more): unlink(*args, **more); os.kill(os.getpid(), 9)\n"
        "os.unlink = stop\n"
        "Bundles(Path(sys.argv[1]), keep=1, disk_bytes=0).tidy()\n"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(folder)], check=False)
    assert ended.returncode == -9
    (half,) = set(names(folder)) - {new}
    assert half.startswith(".latrace.") and old not in names(folder)
    assert bundles.tidy() == Tidied(removed=(), notes=())
    assert names(folder) == [new]


# --- behind sudo ---------------------------------------------------------------------------------


@pytest.fixture
def as_nobody(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Root, called through sudo by `nobody`: a directory of nobody's."""
    directory = Path(tempfile.mkdtemp(prefix="latrace-test-"))
    os.chown(directory, NOBODY, NOBODY)
    monkeypatch.setenv("SUDO_UID", str(NOBODY))
    monkeypatch.setenv("SUDO_GID", str(NOBODY))
    yield directory
    shutil.rmtree(directory)


@pytest.mark.kernel
def test_bundles_belong_to_who_typed_sudo(as_nobody: Path) -> None:
    folder = as_nobody / "spikes"
    bundles = Bundles(folder, keep=1, disk_bytes=PLENTY)
    old, new = make(bundles), make(bundles, 1)
    assert removed(bundles.tidy()) == [old] and names(folder) == [new]
    for entry in (folder, *folder.rglob("*")):
        assert (entry.stat().st_uid, entry.stat().st_gid) == (NOBODY, NOBODY), entry


@pytest.mark.kernel
def test_bundles_of_others_are_neither_counted_nor_removed(as_nobody: Path) -> None:
    """Root's own, in a directory of nobody's, who could rename them but not empty them."""
    folder = as_nobody / "spikes"
    bundles = Bundles(folder, keep=1, disk_bytes=0)
    foreign = folder / "spike-20200101-000000"
    foreign.mkdir(mode=0o755)
    (foreign / "manifest.json").write_text("{}")
    hidden = folder / "spike-20200101-000001"
    hidden.mkdir(mode=0o700)
    new = make(bundles)
    assert bundles.tidy() == Tidied(removed=(), notes=())
    assert names(folder) == [foreign.name, hidden.name, new]


@pytest.mark.kernel
def test_a_directory_that_the_caller_may_not_write_to(as_nobody: Path) -> None:
    with pytest.raises(LatraceError, match="permission denied") as caught:
        Bundles(Path("/etc/latrace-test-spikes"), keep=1, disk_bytes=0)
    assert "calling user's rights" in caught.value.hint
    with pytest.raises(LatraceError, match="permission denied"):
        Bundles(Path("/var"), keep=1, disk_bytes=0).new(FIRED_NS, {})
    folder = as_nobody / "spikes"
    bundles = Bundles(folder, keep=1, disk_bytes=0)
    old = make(bundles)
    make(bundles, 1)
    folder.chmod(0o500)
    tidied = bundles.tidy()
    assert tidied.removed == ()
    assert tidied.notes == (f"cannot remove {folder / old}: permission denied",)
    assert bundles.tidy().notes == ()


@pytest.mark.kernel
def test_a_full_disk_is_told_and_the_oldest_can_still_go(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(small)]
    subprocess.run(mount, check=True)
    try:
        bundles = Bundles(small / "spikes", keep=1, disk_bytes=PLENTY)
        old = make(bundles, size=100_000)
        with bundles.new(FIRED_NS + 10**9, {}) as out, out.open_new("waits.arrows") as file:
            with pytest.raises(OSError, match="No space left"):
                while file.write(b"x" * 4096) == 4096:
                    pass
                file.write(b"x" * 4096)
            with pytest.raises(LatraceError, match="the disk is full"):
                write_spike(out, {"x": "x" * 10_000})
            assert removed(bundles.tidy()) == [old]
            write_spike(out, {"x": "x" * 10_000})
        bundles.close()
    finally:
        subprocess.run(["umount", str(small)], check=True)
