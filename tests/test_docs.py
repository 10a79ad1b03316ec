"""The documentation says what the program does: generated text is current, commands exist."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from types import ModuleType

import pytest

from latrace.tracer import errors

TREE = Path(__file__).resolve().parents[1]
PAGES = sorted([*TREE.glob("*.md"), *TREE.glob("docs/*.md")])


def load_generator() -> ModuleType:
    """Import docs/generate.py, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("docs_generate", TREE / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look their module up by name.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "docs_generate", module)
        spec.loader.exec_module(module)
    return module


GENERATE = load_generator()


@pytest.mark.parametrize("path", GENERATE.outputs(), ids=lambda path: path.name)
def test_generated_files_are_current(path: Path) -> None:
    assert path.read_text() == GENERATE.outputs()[path], "run scripts/docs"


def test_each_column_of_the_schema_is_described() -> None:
    text = (TREE / "docs" / "capture-format.md").read_text()
    for table, columns in GENERATE.schema.TABLES.items():
        section = text.partition(f"### `{table}`\n")[2].partition("###")[0]
        assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == columns.names


def test_a_column_comes_with_its_comment() -> None:
    comments = GENERATE._column_comments()
    assert comments["waits", "cpu"] == "where it ran"
    assert ("waits", "tid") not in comments


def commands_in(text: str) -> list[list[str]]:
    """Return the `latrace …` command lines of a page, each as its words after `latrace`."""
    blocks = re.findall(r"```console\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    lines += re.findall(r"`((?:sudo )?latrace [^`]+)`", text)
    words = [line.removeprefix("sudo ").split() for line in lines]
    return [line[1:] for line in words if line[:1] == ["latrace"]]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_on_the_pages_exist(page: Path) -> None:
    known = {command.name: command for command in GENERATE.read_commands()}
    for words in commands_in(page.read_text()):
        verb = next((word for word in words if not word.startswith("-")), "")
        assert verb in known, words
        options = {name for option in known[verb].options for name in option.names}
        for word in words[: words.index("--") if "--" in words else None]:
            if word.startswith("-") and len(word) > 1:
                assert word in options, words


def test_the_readme_has_the_commands_that_it_promises() -> None:
    found = {" ".join(words) for words in commands_in((TREE / "README.md").read_text())}
    assert {"attach --pid PID", "flame out.svg"} <= found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_scripts_on_the_pages_exist(page: Path) -> None:
    for name in re.findall(r"\bscripts/([a-z][a-z-]*)", page.read_text()):
        assert (TREE / "scripts" / name).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", head).lower().replace(" ", "-") for head in headings}
            assert anchor in slugs, target


def test_the_man_page_has_every_exit_code() -> None:
    kinds = [errors.LatraceError, *errors.LatraceError.__subclasses__()]
    assert {"0", *(str(kind.exit_code) for kind in kinds)} == {
        code for code, _ in GENERATE._EXIT_CODES
    }


def test_the_man_page_is_sound_roff() -> None:
    if shutil.which("man") is None:
        pytest.skip("needs man-db")
    command = ["man", "--warnings", "--local-file", str(TREE / "docs" / "latrace.1")]
    shown = subprocess.run(
        command,
        env={**os.environ, "MANWIDTH": "80", "MAN_KEEP_FORMATTING": "", "LC_ALL": "C.UTF-8"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stderr == ""
    assert "latrace attach [OPTION]..." in shown.stdout


# --- completion ---------------------------------------------------------------------------------


def complete(*words: str) -> list[str]:
    """Return what bash offers for the last of these words."""
    script = TREE / "docs" / "completions" / "latrace.bash"
    run = (
        'compopt() { :; }; source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); '
        '_latrace; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    command = ["bash", "--norc", "-uc", run, "bash", str(script), "latrace", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


def test_bash_completes_commands_options_and_choices() -> None:
    assert complete("fl") == ["flame"]
    assert complete("attach", "--ch") == ["--children"]
    assert complete("flame", "--kind", "w") == ["wait", "waker", "wall"]
    assert complete("attach", "--duration", "") == []


def test_bash_completes_process_ids() -> None:
    own = str(os.getpid())
    assert own in complete("attach", "--pid", own)


def test_bash_expands_nothing_in_a_process_name(tmp_path: Path) -> None:
    # Anybody can call a process so; 15 bytes are what the kernel keeps.
    name = "zz$(>zzz_x)"
    (tmp_path / name).symlink_to("/bin/sleep")
    with subprocess.Popen([tmp_path / name, "30"], executable=str(tmp_path / name)) as process:
        try:
            comm = Path(f"/proc/{process.pid}/comm")
            # exec closes the pipe that Popen waits for a moment before it sets the name.
            deadline = time.monotonic() + 10
            while comm.read_text() != name + "\n":
                assert time.monotonic() < deadline
                time.sleep(0.001)
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(tmp_path)
                assert complete("attach", "--comm", "zz$") == [r"zz\$\(\>zzz_x\)"]
        finally:
            process.kill()
    assert not (tmp_path / "zzz_x").exists()


@pytest.mark.parametrize(("shell", "kind"), [("zsh", "zsh"), ("fish", "fish"), ("bash", "bash")])
def test_completions_parse(shell: str, kind: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    script = TREE / "docs" / "completions" / f"latrace.{kind}"
    done = subprocess.run([shell, "-n", str(script)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
