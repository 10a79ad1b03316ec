"""Perf maps: what their lines mean, and which files are not believed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from symbols_tools import addresses

from latrace.tracer.symbols import perfmap
from latrace.tracer.symbols.perfmap import PIECE, PerfMap, open_perf_map
from latrace.tracer.symbols.procfs import Fd, Refused

PLENTY = 1 << 30


def perf_map(path: Path) -> PerfMap:
    return PerfMap(Fd(os.open(path, os.O_RDONLY)))


def read(path: Path, text: bytes) -> PerfMap:
    path.write_bytes(text)
    result = perf_map(path)
    result.catch_up(PLENTY)
    return result


def names(found: PerfMap, *addrs: int) -> list[str | None]:
    indices = found.lookup(addresses(*addrs)).tolist()
    return [found.name(index) if index >= 0 else None for index in indices]


def test_lines_are_start_size_and_name_with_blanks(tmp_path):
    found = read(
        tmp_path / "map",
        b"1000 10 JS:*hot file.js:1:2\n0x2000 0x20 Ljava/lang/Object;::hash\nABCD0 1f Upper\n",
    )
    assert names(found, 0x1000, 0x100F, 0x1010, 0xFFF) == ["JS:*hot file.js:1:2"] * 2 + [None] * 2
    assert names(found, 0x201F, 0xABCD0) == ["Ljava/lang/Object;::hash", "Upper"]
    assert found.start(int(found.lookup(addresses(0x2010))[0])) == 0x2000
    assert found.malformed == 0


BAD = [
    b"", b"1000", b"1000 10", b"1000 10 ", b" 10 name", b"xyz 10 name", b"1000 zz name",
    b"1000  name", b"11112222333344445 10 name", b"1000 0 empty", b"-1000 10 name",
    b"ffffffffffffffff 10 wraps", b"1000 7fffffffffff huge", b"0x 10 name", b"\0\0\0\0",
]  # fmt: skip


@pytest.mark.parametrize("line", BAD)
def test_malformed_lines_are_counted_and_skipped(tmp_path, line):
    found = read(tmp_path / "map", b"1000 10 before\n" + line + b"\n2000 10 after\n")
    assert (len(found), found.malformed) == (2, 1)
    assert names(found, 0x1000, 0x2000) == ["before", "after"]


ENTRIES = st.lists(
    st.tuples(st.integers(0, 50), st.integers(1, 30)), min_size=1, max_size=30
)  # fmt: skip


@settings(deadline=None)
@given(entries=ENTRIES, cuts=st.lists(st.integers(0, 40), max_size=4))
def test_of_all_that_hold_an_address_the_last_line_wins(tmp_path_factory, entries, cuts):
    """Written and read in pieces that end anywhere, also within a line."""
    text = b"".join(b"%x %x n%d\n" % (start, size, i) for i, (start, size) in enumerate(entries))
    path = tmp_path_factory.getbasetemp() / "fuzzed.map"
    path.write_bytes(b"")
    found = perf_map(path)
    try:
        with path.open("ab", buffering=0) as file:
            for begin, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(text)], strict=True):
                file.write(text[begin:end])
                found.catch_up(PLENTY)
                found.lookup(addresses(1))
        for addr in range(85):
            holding = [i for i, (start, size) in enumerate(entries) if start <= addr < start + size]
            assert names(found, addr) == [f"n{holding[-1]}" if holding else None]
        assert found.malformed == 0
    finally:
        found.close()
        path.unlink()


@settings(deadline=None)
@given(text=st.binary(max_size=300))
def test_no_bytes_break_the_reader(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "fuzzed.map"
    found = read(path, text + b"\n")
    found.lookup(addresses(0, 1, 2**64 - 1))
    lines = text.count(b"\n") + 1
    assert len(found) + found.malformed == lines
    found.close()
    path.unlink()


def test_a_budget_bounds_one_look_and_the_next_goes_on(tmp_path):
    path = tmp_path / "map"
    path.write_bytes(b"".join(b"%x 10 name\n" % (i * 16) for i in range(1000)))
    found = perf_map(path)
    assert found.catch_up(500)
    first = len(found)
    assert 0 < first < 1000
    while found.catch_up(500):
        pass
    assert len(found) == 1000


def test_an_endless_line_is_given_up_once(tmp_path):
    found = read(tmp_path / "map", b"1000 10 a\n" + b"x" * (3 * PIECE) + b"\n2000 10 b\n")
    assert (len(found), found.malformed) == (2, 1)
    assert names(found, 0x2000) == ["b"]


def test_a_long_name_is_cut_and_a_hostile_one_escaped(tmp_path):
    found = read(tmp_path / "map", b"1000 10 " + b"n" * 10_000 + b"\n2000 10 \x1b]0;x\x07\xff\n")
    assert names(found, 0x1000, 0x2000) == ["n" * 4096, "\\x1b]0;x\\x07\\xff"]


def test_a_map_written_anew_forgets_the_old_one(tmp_path):
    found = read(tmp_path / "map", b"1000 10 old\n2000 10 old2\n")
    (tmp_path / "map").write_bytes(b"1000 10 new\n")
    assert found.catch_up(PLENTY)
    assert names(found, 0x1000, 0x2000) == ["new", None]


def test_a_longer_map_written_over_the_old_one_is_read_from_its_beginning(tmp_path):
    """As the JVM does, asked again: old code in the middle is gone, new code is in between."""
    old = [b"%x 10 old%d\n" % (0x1000 + i * 16, i) for i in range(1000)]
    new = [*old[:500], b"9000 10 fresh\n", *old[501:], b"a000 10 last\n"]
    found = read(tmp_path / "map", b"".join(old))
    assert names(found, 0x1000 + 500 * 16, 0x1000 + 999 * 16) == ["old500", "old999"]
    (tmp_path / "map").write_bytes(b"".join(new))
    # What the file says at the place of a name is no longer about that code.
    assert names(found, 0x1000 + 999 * 16) == [None]
    assert found.catch_up(PLENTY)
    assert names(found, 0x1000 + 500 * 16, 0x1000 + 999 * 16) == [None, "old999"]
    assert names(found, 0x9000, 0xA000) == ["fresh", "last"]
    assert len(found) == 1001


def test_a_map_that_says_other_things_in_as_many_bytes_is_noticed(tmp_path):
    found = read(tmp_path / "map", b"1000 10 one\n")
    (tmp_path / "map").write_bytes(b"1000 10 two\n")
    assert found.catch_up(PLENTY)
    assert names(found, 0x1000) == ["two"]
    assert not found.catch_up(PLENTY)


def test_too_many_entries_are_dropped_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(perfmap, "ENTRY_LIMIT", 10)
    found = read(tmp_path / "map", b"".join(b"%x 10 n\n" % (i * 16) for i in range(25)))
    assert (len(found), found.dropped) == (10, 15)


# --- which files are believed ------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path) -> Fd:
    (tmp_path / "tmp").mkdir()
    return Fd(os.open(tmp_path, os.O_PATH | os.O_DIRECTORY))


def refusal(root: Fd, uid: int | None = None) -> str:
    with pytest.raises(Refused) as caught:
        open_perf_map(root, inner_pid=7, uid=os.getuid() if uid is None else uid)
    return str(caught.value)


def test_the_target_s_own_map_is_opened(root, tmp_path):
    (tmp_path / "tmp/perf-7.map").write_text("1000 10 a\n")
    found = PerfMap(open_perf_map(root, inner_pid=7, uid=os.getuid()))
    assert found.catch_up(PLENTY)


def test_a_missing_map_is_no_refusal(root):
    with pytest.raises(FileNotFoundError):
        open_perf_map(root, inner_pid=7, uid=os.getuid())


def test_the_map_of_another_user_is_refused(root, tmp_path):
    (tmp_path / "tmp/perf-7.map").write_text("1000 10 a\n")
    assert refusal(root, os.getuid() + 1) == "owned by another user"


def test_a_map_that_everybody_may_write_is_refused(root, tmp_path):
    (tmp_path / "tmp/perf-7.map").write_text("1000 10 a\n")
    (tmp_path / "tmp/perf-7.map").chmod(0o666)
    assert refusal(root) == "writable by everybody"


@pytest.mark.parametrize("target", ["/etc/shadow", "/etc/passwd", "real", "nowhere"])
def test_links_are_refused_wherever_they_lead(root, tmp_path, target):
    (tmp_path / "tmp/real").write_text("1000 10 a\n")
    (tmp_path / "tmp/perf-7.map").symlink_to(target)
    assert refusal(root) == "a symbolic link"


def test_pipes_devices_and_directories_are_refused_at_once(root, tmp_path):
    os.mkfifo(tmp_path / "tmp/perf-7.map")
    assert refusal(root) == "not a regular file"
    (tmp_path / "tmp/perf-7.map").unlink()
    (tmp_path / "tmp/perf-7.map").mkdir()
    assert refusal(root) == "not a regular file"


def test_a_map_past_the_size_limit_is_refused(root, tmp_path):
    with (tmp_path / "tmp/perf-7.map").open("wb") as file:
        file.truncate((256 << 20) + 1)
    assert refusal(root) == "too big"


def test_a_linked_tmp_stays_beneath_the_root(root, tmp_path):
    """The directory may be a link, but an absolute one starts at the target's root."""
    (tmp_path / "tmp").rmdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/perf-7.map").write_text("1000 10 a\n")
    (tmp_path / "tmp").symlink_to("/elsewhere")
    open_perf_map(root, inner_pid=7, uid=os.getuid()).close()
    (tmp_path / "tmp").unlink()
    (tmp_path / "tmp").symlink_to(f"/../../..{tmp_path}/elsewhere")
    with pytest.raises(OSError):
        open_perf_map(root, inner_pid=7, uid=os.getuid())
    (tmp_path / "tmp").unlink()
    (tmp_path / "tmp").symlink_to("/proc/self/root/tmp")
    with pytest.raises(OSError):
        open_perf_map(root, inner_pid=7, uid=os.getuid())
