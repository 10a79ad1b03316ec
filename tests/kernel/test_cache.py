"""Compiled probes are kept between runs, in a place that only root can write."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from latrace.tracer import cache, compile, loader
from latrace.tracer.compiled import Compiled
from latrace.tracer.options import Options

pytestmark = pytest.mark.kernel

BUILD = loader.build_for(Options(pids=(1,)))


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the cache keeps things during this test."""
    monkeypatch.setattr(cache, "DIRECTORY", tmp_path / "cache")
    return tmp_path / "cache"


def no_compiler(*_: object) -> Compiled:
    raise AssertionError("compiled again")


def only(directory: Path) -> Path:
    (file,) = directory.iterdir()
    return file


def test_the_second_load_needs_no_compiler(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = loader.load(BUILD)
    names = set(first.programs)
    first.close()
    assert kept.stat().st_mode & 0o777 == 0o700
    assert only(kept).stat().st_mode & 0o777 == 0o600
    monkeypatch.setattr(loader, "compile_probes", no_compiler)
    second = loader.load(BUILD)
    assert set(second.programs) == names
    second.attach()
    second.close()


def damage(file: Path) -> None:
    text = bytearray(file.read_bytes())
    text[len(text) // 2] ^= 1
    file.write_bytes(text)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:1000])


def give_away(file: Path) -> None:
    os.chown(file, 65534, 65534)


def open_up(file: Path) -> None:
    file.chmod(0o622)


def link(file: Path) -> None:
    real = file.with_name("elsewhere")
    file.rename(real)
    file.symlink_to(real)


@pytest.mark.parametrize("harm", [damage, truncate, give_away, open_up, link])
def test_what_cannot_be_trusted_is_compiled_again(
    kept: Path, monkeypatch: pytest.MonkeyPatch, harm: object
) -> None:
    loader.load(BUILD).close()
    assert callable(harm)
    harm(only(kept))
    monkeypatch.setattr(loader, "compile_probes", no_compiler)
    with pytest.raises(AssertionError, match="compiled again"):
        loader.load(BUILD)


def test_a_directory_of_others_is_not_used(kept: Path) -> None:
    kept.mkdir()
    kept.chmod(0o777)
    loader.load(BUILD).close()
    assert not list(kept.iterdir())


def test_what_the_kernel_refuses_is_compiled_again(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = compile.compile_probes

    def spoilt(*arguments: object) -> Compiled:
        made = real(*arguments)  # type: ignore[arg-type]
        refused = type(made.programs[0])(
            made.programs[0].name, bytes(8), made.programs[0].attach_type_id, iterator=False
        )
        return Compiled(made.maps, (refused, *made.programs[1:]))

    loader.load(BUILD).close()
    file = only(kept)
    cache.keep(file.name, spoilt(*_arguments(monkeypatch)))
    loader.load(BUILD).close()
    assert cache.find(file.name) is not None
    loader.load(BUILD).close()


def _arguments(monkeypatch: pytest.MonkeyPatch) -> tuple[object, ...]:
    """What `load` hands to the compiler."""
    seen: list[tuple[object, ...]] = []

    def spy(*arguments: object) -> Compiled:
        seen.append(arguments)
        raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(loader, "compile_probes", spy)
        patch.setattr(cache, "find", lambda _: None)
        with pytest.raises(InterruptedError):
            loader.load(BUILD)
    return seen[0]


def test_only_the_newest_are_kept(kept: Path) -> None:
    for number in range(40):
        cache.keep(f"probes-{number}", Compiled((), ()))
    assert len(list(kept.iterdir())) <= 16
    assert cache.find("probes-39") == Compiled((), ())
    assert cache.find("probes-0") is None
