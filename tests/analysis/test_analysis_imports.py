"""The views of a capture must work where nothing of the tracer can be imported."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

PROBE = """
import importlib, importlib.abc, json, pkgutil, sys

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "bcc" or name.startswith(("bcc.", "latrace.tracer", "latrace.probes")):
            raise ImportError("blocked: " + name)

sys.meta_path.insert(0, Block())
package = importlib.import_module(sys.argv[1])
names = [package.__name__] + [
    module.name for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".")
]
for name in names:
    importlib.import_module(name)
print(json.dumps({"walked": names, "loaded": sorted(sys.modules)}))
"""


def run_python(code: str, *args: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("package", ["latrace.analysis", "latrace.flamegraphs"])
def test_pure_packages_import_no_tracer_and_no_bcc(package: str) -> None:
    found = json.loads(run_python(PROBE, package))
    assert len(found["walked"]) > 5
    assert not [
        name for name in found["loaded"] if name.split(".")[0] == "bcc" or "latrace.tracer" in name
    ]


def test_the_block_works() -> None:
    code = PROBE.replace("package = ", "import latrace.tracer\npackage = ")
    done = subprocess.run(
        [sys.executable, "-c", code, "latrace.analysis"], capture_output=True, check=False
    )
    assert b"blocked: latrace.tracer" in done.stderr


@pytest.mark.parametrize("module", ["latrace", "latrace.tracer.writer", "latrace.tracer.outputs"])
def test_what_records_imports_pyarrow_late(module: str) -> None:
    loaded = json.loads(
        run_python(f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))")
    )
    assert module in loaded
    assert not [name for name in loaded if name.split(".")[0] in ("pyarrow", "pandas", "rich")]
