"""What is installed is what is here: no package, BPF source or asset is left out of the wheel."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

TREE = Path(__file__).resolve().parents[1]
TOP = {"tracer": "latrace.tracer", "analysis": "latrace.analysis"} | {
    "flamegraphs": "latrace.flamegraphs",
    "probes": "latrace.probes",
}
PROJECT = tomllib.loads((TREE / "pyproject.toml").read_text())


def tracked_files() -> list[Path]:
    """List the files of the tree: what git knows or would take, without what it ignores."""
    if shutil.which("git") is None or not (TREE / ".git").exists():
        pytest.skip("needs git and a checkout")
    command = ["git", "-c", f"safe.directory={TREE}", "ls-files", "-z", "-co", "--exclude-standard"]
    listed = subprocess.run(command, cwd=TREE, capture_output=True, check=True).stdout
    return [TREE / os.fsdecode(name) for name in listed.split(b"\0") if name]


def installed_name(path: Path) -> str:
    """Give the path inside the wheel of a file of the tree."""
    folder, *rest = path.relative_to(TREE).parts
    if [folder, *rest[:1]] == ["tracer", "_root"]:
        return "/".join(["latrace", *rest[1:]])
    return "/".join([*TOP[folder].split("."), *rest])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Build the wheel from a copy, as an installation does, without asking any index."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in TOP:
        shutil.copytree(
            TREE / name, source / name, ignore=shutil.ignore_patterns("__pycache__", ".*")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(TREE / name, source)
    command = [sys.executable, "-I", "-m", "pip", "wheel", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--no-index", "--wheel-dir", str(folder), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_every_package_folder_is_listed() -> None:
    packages = {"latrace": "tracer/_root"}
    for name, package in TOP.items():
        for init in (TREE / name).rglob("__init__.py"):
            below = init.parent.relative_to(TREE / name).parts
            if (name, *below) != ("tracer", "_root"):
                folder = init.parent.relative_to(TREE)
                packages[".".join([package, *below])] = folder.as_posix()
    setuptools = PROJECT["tool"]["setuptools"]
    assert set(setuptools["packages"]) == set(packages)
    assert setuptools["package-dir"] == packages


def test_no_python_file_lies_in_a_folder_that_is_no_package() -> None:
    for name in TOP:
        for path in (TREE / name).rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), path


def test_the_wheel_holds_every_source_and_asset(wheel: zipfile.ZipFile) -> None:
    kinds = {".py", ".typed", ".c", ".h", ".js", ".css"}
    wanted = {
        installed_name(path)
        for name in TOP
        for path in (TREE / name).rglob("*")
        if path.suffix in kinds and "__pycache__" not in path.parts
    } | {"latrace/py.typed"}
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == wanted
    assert any(name.startswith("latrace/probes/") and name.endswith(".bpf.c") for name in held)


def test_the_wheel_carries_the_licence_and_the_command(wheel: zipfile.ZipFile) -> None:
    (info,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    metadata = Parser().parsestr(wheel.read(f"{info}/METADATA").decode())
    assert metadata["License-File"] == "LICENSE"
    assert "latrace = latrace.tracer.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()


def test_the_version_is_the_same_everywhere(wheel: zipfile.ZipFile) -> None:
    version = PROJECT["project"]["version"]
    root = (TREE / "tracer" / "_root" / "__init__.py").read_text()
    assert re.search(r'^__version__ = "(.*)"$', root, re.MULTILINE)[1] == version  # type: ignore[index]
    newest = re.search(r"^## \[(.+?)\]", (TREE / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == version
    assert any(name.startswith(f"latrace-{version}.dist-info/") for name in wheel.namelist())


def test_bcc_comes_from_the_distribution_only() -> None:
    # The package of that name on the Python index is an unrelated project.
    listed = PROJECT["project"]["dependencies"] + [
        requirement
        for extra in PROJECT["project"]["optional-dependencies"].values()
        for requirement in extra
    ]
    assert not [requirement for requirement in listed if re.match(r"bcc\b", requirement)]


def test_no_registry_host_is_named() -> None:
    # Packages are asked for by name; where they come from is the machine's configuration.
    hosts = re.compile(
        rb"(pypi|pythonhosted|npmjs|debian|ubuntu|docker|ghcr|quay)\.(org|com|io)\b", re.IGNORECASE
    )
    for path in tracked_files():
        if path.is_file() and path != Path(__file__).resolve():
            assert not (found := hosts.search(path.read_bytes())), f"{path}: {found}"


def test_the_scripts_can_be_run() -> None:
    files = [path for path in (TREE / "scripts").iterdir() if path.is_file()]
    scripts = [path for path in files if path.read_bytes()[:2] == b"#!"]
    assert {"quickstart", "test", "check", "bare-roots", "docs"} <= {p.name for p in scripts}
    for path in [*scripts, TREE / ".ci" / "run"]:
        assert os.access(path, os.X_OK), path
