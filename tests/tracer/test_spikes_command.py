"""`latrace spikes`, and the process that explains a bundle, as the watch starts it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command

from latrace.analysis.errors import CaptureError
from latrace.analysis.words import cells
from latrace.tracer.cli import main
from latrace.tracer.commands.spikes import ago, find_bundles, spikes, table
from latrace.tracer.errors import LatraceError
from latrace.tracer.watch import analysis as explaining

sys.path.append(str(Path(__file__).parents[1] / "analysis"))
from spike_samples import FIRED_REALTIME_NS, S, document, neighbour, trigger, write_bundle

FIRST, SECOND = "spike-20261121-113205", "spike-20261121-113205-2"
THIRD, FOURTH = "spike-20261121-120000", "spike-20261122-000000"
HOSTILE = "\x1b[2J\u202e'\"<script>\n" + "x" * 100
NOBODY = 65534


def command(*args: str) -> None:
    app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command()(spikes)
    get_command(app).main(args=list(args), prog_name="latrace spikes", standalone_mode=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four bundles: explained, cut off, not explained, damaged; and what is none."""
    path = tmp_path_factory.mktemp("folder")
    first = write_bundle(path / FIRST, neighbour(), document(name=FIRST))
    explaining.analyse_bundle(first)
    for name in (SECOND, THIRD, FOURTH):
        shutil.copytree(first, path / name)
    (path / SECOND / "spike.json").unlink()
    manifest = json.loads((path / SECOND / "manifest.json").read_text())
    (path / SECOND / "manifest.json").write_text(json.dumps(manifest | {"complete": False}))
    later = {"name": THIRD, "fired_realtime_ns": FIRED_REALTIME_NS + 1675 * S}
    told = document(trigger(), trigger(rule="--retransmits 3", kind="retransmits"), **later)
    (path / THIRD / "spike.json").write_text(json.dumps(told))
    (path / FOURTH / "spike.json").write_text("{")
    (path / "spike-20261122-000001").symlink_to(path / FIRST)
    (path / "spike-20261122-000002").write_text("a file")
    (path / "notes").mkdir()
    return path


# --- the list ----------------------------------------------------------------------------------


def test_one_line_for_each_the_newest_last(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command(str(folder))
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [FIRST, SECOND, THIRD, FOURTH]
    assert all(cells(line) <= 80 for line in lines)
    assert "p99 10ms" in lines[1]
    assert "12.0 ms" in lines[1]
    assert "batch-inde" in lines[1]
    assert "not complete" in lines[2]
    assert "p99 10ms +1" in lines[3]
    assert "11.0 ms" in lines[3]
    assert "not analysed" in lines[3]
    assert "damaged" in lines[4]
    assert "4 bundles, " in err
    assert f"report -i {folder / FOURTH}" in err


@pytest.mark.parametrize(
    ("told", "mostly"),
    [
        ({"where": {"collector": 0.2}, "locked": ""}, "own work"),
        ({"where": {"collector": 0.8}, "locked": ""}, "Go's collector"),
        ({"where": {"collector": 0.0}, "locked": "60 of 81 goroutines"}, "goroutine lock"),
        ({"where": None}, "own work"),
    ],
)
def test_a_service_by_its_own_metric(
    tmp_path: Path, told: dict[str, Any], mostly: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / FIRST).mkdir()
    fired = trigger(rule="--metric took_s P99", kind="metric", value=0.4, unit="s")
    analysis = {"cause": "on_cpu", "name": "", "culprit": None, "value": 0.4} | told
    (tmp_path / FIRST / "spike.json").write_text(
        json.dumps(document(fired) | {"analysis": analysis})
    )
    (tmp_path / FIRST / "manifest.json").write_text('{"complete": true}')
    command(str(tmp_path))
    (_, line) = capsys.readouterr().out.splitlines()
    assert "  took_s P99 " in line
    assert f" 400 ms  {mostly} " in line


def test_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command(str(folder), "--json")
    out, err = capsys.readouterr()
    assert not err
    first, second, third, fourth = json.loads(out)
    assert first["name"] == FIRST
    assert first["path"] == str(folder / FIRST)
    assert first["complete"] is True
    assert first["fired_realtime_ns"] == FIRED_REALTIME_NS
    assert first["triggers"][0]["rule"] == "--p99 10ms"
    assert first["analysis"]["culprit"]["comm"] == "batch-indexer"
    assert first["bytes"] == sum(file.stat().st_size for file in (folder / FIRST).iterdir())
    assert (second["complete"], second["analysis"], second["triggers"]) == (False, None, [])
    assert second["fired_realtime_ns"] == FIRED_REALTIME_NS  # by its name
    assert third["analysis"] is None
    assert "spike.json is damaged" in fourth["trouble"]


def test_none_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command(str(tmp_path))
    assert capsys.readouterr().out == f"No bundles in {tmp_path} yet\n"
    command(str(tmp_path), "--json")
    assert json.loads(capsys.readouterr().out) == []


@pytest.mark.parametrize("name", ["nowhere", "file"])
def test_no_such_directory(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LatraceError) as caught:
        command(str(tmp_path / name))
    assert caught.value.exit_code == 1
    assert "latrace spikes DIR" in caught.value.hint


def test_a_bundle_is_no_directory_of_bundles(folder: Path) -> None:
    with pytest.raises(LatraceError) as caught:
        command(str(folder / FIRST))
    assert f"report -i {folder / FIRST}" in caught.value.hint


def hostile_documents() -> list[Any]:
    told = document(trigger(rule=HOSTILE, unit=HOSTILE), trigger(), name=HOSTILE)
    whole = {"cause": HOSTILE, "name": HOSTILE, "culprit": {"comm": HOSTILE}, "value": 5}
    parts: list[Any] = [[], 3, "x", {}, whole, {"cause": 3}, {"cause": "own", "culprit": [1]}]
    parts += [{"cause": "blocked", "name": HOSTILE, "value": 10**400}, {"cause": {}, "value": "x"}]
    parts += [{"cause": "blocked", "name": "\ud800"}, {"value": True}]
    parts += [{"cause": "on_cpu", "where": 3, "locked": [HOSTILE]}]
    parts += [{"cause": "on_cpu", "where": {"collector": HOSTILE}, "locked": ""}]
    return [told | {"analysis": part} for part in parts]


@pytest.mark.parametrize("told", hostile_documents())
def test_what_a_file_says_does_no_harm(
    tmp_path: Path, told: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / FIRST
    bundle.mkdir()
    (bundle / "spike.json").write_text(json.dumps(told))
    (bundle / "manifest.json").write_text('{"complete": true}')
    command(str(tmp_path))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all(line.isprintable() and cells(line) <= 80 for line in lines)
    command(str(tmp_path), "--json")
    assert len(json.loads(capsys.readouterr().out)) == 1


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_file_does_no_harm(tmp_path: Path, make: Callable[[Path], object]) -> None:
    bundle = tmp_path / FIRST
    bundle.mkdir()
    for name in ("spike.json", "manifest.json"):
        make(bundle / name)
    (found,) = find_bundles(tmp_path)
    assert found.trouble
    assert not found.complete


def test_digits_that_are_no_date(tmp_path: Path) -> None:
    (tmp_path / "spike-99999999-999999-12").mkdir()
    (found,) = find_bundles(tmp_path)
    assert found.fired_realtime_ns == 0
    assert all(cells(line) <= 80 for line in table([found], now_ns=2**62))


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(-5, "0 s"), (89, "89 s"), (90, "1 min"), (5399, "89 min"), (5400, "1 h"),
     (172_799, "47 h"), (172_800, "2 d"), (63_000_000, "729 d"), (86_400_000, "2 y")],
)  # fmt: skip
def test_how_long_ago(seconds: int, said: str) -> None:
    assert ago(seconds * S) == said


# --- the report --------------------------------------------------------------------------------


def test_the_report_of_a_bundle_begins_with_the_spike(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "-i", str(folder / FIRST)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"Spike {FIRST}: --p99 10ms\n")
    assert "payments-api (pid 812): " in out
    assert all(cells(line) <= 80 for line in out.splitlines())
    assert main(["report", "-i", str(folder / FIRST), "--since", "1s"]) == 0
    assert not capsys.readouterr().out.startswith("Spike")


def test_the_report_as_json_has_the_spike(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "-i", str(folder / FIRST), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["spike"] == json.loads((folder / FIRST / "spike.json").read_text())
    for other in (["-i", str(folder / SECOND)], ["-i", str(folder / FIRST), "--over", "1ms"]):
        assert main(["report", "--json", *other]) == 0
        assert "spike" not in json.loads(capsys.readouterr().out)


def test_the_page_of_a_bundle(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    assert main(["report", "-i", str(folder / FIRST), "-o", str(out), "-q"]) == 0
    assert out.read_bytes() == (folder / FIRST / "report.html").read_bytes()


def test_a_damaged_file_does_not_cost_the_report(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "-i", str(folder / FOURTH)]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("payments-api")
    assert "spike.json is damaged" in err


# --- the process that explains -----------------------------------------------------------------


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / FIRST, neighbour(), document(name=FIRST))


def explain(path: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-I", "-m", "latrace.tracer.watch.analysis", str(path)],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        env={"PATH": os.defpath, **environ},
        timeout=120,
    )


def test_a_bundle_is_explained(bundle: Path) -> None:
    before = json.loads((bundle / "spike.json").read_text())
    done = explain(bundle)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1
    assert done.stdout.endswith("100 % other processes: batch-indexer (pid 998).\n")
    after = json.loads((bundle / "spike.json").read_text())
    assert after["analysis"]["culprit"]["comm"] == "batch-indexer"
    assert {**after, "analysis": None} == before
    assert (bundle / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert not list(bundle.glob(".latrace.*"))


def test_it_is_explained_again(bundle: Path) -> None:
    first = explaining.analyse_bundle(bundle)
    page = (bundle / "report.html").read_bytes()
    assert explaining.analyse_bundle(bundle) == first
    assert (bundle / "report.html").read_bytes() == page


def test_trouble_is_one_line(tmp_path: Path, folder: Path) -> None:
    for path in (tmp_path / "nowhere", folder / SECOND, folder / FOURTH):
        done = explain(path)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("latrace: ")
        assert done.stderr.count("\n") == 1


def test_a_link_is_not_written_through(bundle: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (bundle / "report.html").symlink_to(victim)
    with pytest.raises(LatraceError):
        explaining.analyse_bundle(bundle)
    assert victim.read_text() == "mine"
    assert json.loads((bundle / "spike.json").read_text())["analysis"]  # this much is kept


def test_what_is_no_bundle(folder: Path) -> None:
    with pytest.raises(CaptureError, match="is not a bundle"):
        explaining.analyse_bundle(folder / SECOND)


AS_USER = """
import json, os, sys
from latrace.tracer.watch import analysis

become, opened, imported = analysis.become, [], []

def watched(account):
    become(account)
    known = set(sys.modules)
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
    sys.addaudithook(
        lambda event, args: imported.append(args[0])
        if event == "import" and args[0] not in known else None
    )

analysis.become = watched
code = analysis.main(sys.argv[1:])
print(json.dumps({"code": code, "uid": os.getuid(), "opened": opened, "imported": imported}))
"""


@pytest.fixture
def of_nobody() -> Iterator[Path]:
    """A bundle of another user's, in a place that this user can walk to."""
    path = Path(tempfile.mkdtemp(prefix="latrace-test-", dir="/tmp"))
    made = write_bundle(path / FIRST, neighbour(), document(name=FIRST))
    for one in (path, made, *made.iterdir()):
        os.chown(one, NOBODY, NOBODY)
    yield made
    shutil.rmtree(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give it up")
def test_behind_sudo_it_is_the_users_and_loads_nothing_after(of_nobody: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", AS_USER, str(of_nobody)],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        env={"PATH": os.defpath, "SUDO_UID": str(NOBODY), "SUDO_GID": str(NOBODY)},
        timeout=120,
    )
    assert done.stderr == ""
    told = json.loads(done.stdout.splitlines()[-1])
    assert (told["code"], told["uid"]) == (0, NOBODY)
    # The user may not be able to read the program's files.
    assert not [name for name in told["opened"] if sys.prefix in name or name.endswith(".py")]
    assert not told["imported"]
    for name in ("spike.json", "report.html"):
        assert (of_nobody / name).stat().st_uid == NOBODY
