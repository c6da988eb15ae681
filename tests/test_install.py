"""The package installs anywhere, and says what became of its extension."""

import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fastmeta.backends import BUILD_RECORD, backends, describe
from fastmeta.version import __version__

ROOT = Path(__file__).parent.parent

# Not `from fastmeta import backends`: that name is the public function.
backends_module = importlib.import_module("fastmeta.backends")


@pytest.fixture
def no_extension(monkeypatch, tmp_path):
    """The package as it is where fastmeta._C was not built; write a record to the path returned."""
    monkeypatch.setitem(sys.modules, "fastmeta._C", None)
    record = tmp_path / "_build.json"
    monkeypatch.setattr(backends_module, "BUILD_RECORD", record)
    return record


def test_the_package_under_test_is_installed():
    assert BUILD_RECORD.exists(), (
        f"fastmeta comes from {BUILD_RECORD.parent}, which was never built: "
        "run `pytest`, not `python -m pytest`, or install with `make install`"
    )


def test_info_runs(tmp_path):
    # From another folder, because `python -m` would import from the checkout.
    run = subprocess.run(
        [sys.executable, "-m", "fastmeta", "info"], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert re.search(rf"^fastmeta +{re.escape(__version__)} ", run.stdout, re.MULTILINE)
    assert re.search(r"^generic +live ", run.stdout, re.MULTILINE)


def test_without_a_command_help_is_printed(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "fastmeta"], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 2
    assert "info" in run.stdout
    assert "demo" in run.stdout


def test_what_is_not_live_has_a_reason():
    found = backends()
    assert found["generic"].live
    assert all(backend.detail for backend in found.values())
    assert [name for name, backend in found.items() if name != backend.name] == []


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs Linux's /proc/cpuinfo")
def test_extension_sees_the_processor_as_the_kernel_does():
    extension = pytest.importorskip("fastmeta._C", reason="the extension was not built here")
    cpuinfo = Path("/proc/cpuinfo").read_text()
    line = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.MULTILINE)
    assert line is not None
    flags = line[1].split()
    seen = extension.cpu_features()
    # Arm calls NEON `asimd`; an x86 flag never occurs on Arm, nor the reverse.
    assert seen == {name: {"neon": "asimd"}.get(name, name) in flags for name in seen}


def test_extension_is_live_where_the_record_says_built():
    built = json.loads(BUILD_RECORD.read_text())["built"]
    extension = backends()["extension"]
    assert extension.live == built, extension
    if built:
        assert __version__ in extension.detail


def test_missing_extension_gives_the_recorded_reason(no_extension):
    record = {"built": False, "reason": "no C++ compiler", "remedy": "install one"}
    no_extension.write_text(json.dumps(record))
    extension = backends()["extension"]
    assert not extension.live
    assert "no C++ compiler" in extension.detail
    assert extension.remedy == "install one"
    assert "no C++ compiler" in describe()
    assert "install one" in describe()


def test_missing_extension_of_another_python(no_extension):
    no_extension.write_text(json.dumps({"built": True, "compiler": "g++", "flags": []}))
    extension = backends()["extension"]
    assert not extension.live
    assert "another Python" in extension.detail


def test_source_tree_that_was_not_built_says_so(no_extension):
    extension = backends()["extension"]
    assert not extension.live
    assert "was not built" in extension.detail
    assert extension.remedy is not None


def test_extension_of_another_version_is_not_live(monkeypatch):
    pytest.importorskip("fastmeta._C", reason="the extension was not built here")
    monkeypatch.setattr(backends_module, "__version__", "99.0")
    extension = backends()["extension"]
    assert not extension.live
    assert "99.0" in extension.detail


def test_sources_know_no_torch():
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".h", ".cpp", ".cu"}]
    assert sources
    includes = re.compile(r"^\s*#\s*include\s*[<\"](torch|ATen|c10)/", re.MULTILINE)
    assert [path for path in sources if includes.search(path.read_text(encoding="utf-8"))] == []
    imports = re.compile(r"^\s*(import|from) torch\b", re.MULTILINE)
    for script in ("setup.py", "cuda_build.py"):
        assert not imports.search((ROOT / script).read_text())


def test_every_package_is_listed():
    tomllib = pytest.importorskip("tomllib", reason="came with Python 3.11")
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = [file.parent.relative_to(ROOT) for file in (ROOT / "fastmeta").rglob("__init__.py")]
    assert sorted(listed) == sorted([*(".".join(f.parts) for f in folders), "fastmeta.kernels"])


def build_wheel(folder: Path, **environment: str) -> tuple[subprocess.CompletedProcess, list[Path]]:
    """Builds a wheel from a copy of the sources, so that no earlier build can serve it."""
    for tool in ("setuptools", "pybind11"):
        if importlib.util.find_spec(tool) is None:
            pytest.skip(f"building without isolation needs {tool} in this environment")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "cuda_build.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("csrc", "fastmeta", "kernels"):
        leftovers = shutil.ignore_patterns("__pycache__", "_build.json", "_C.*", "_cuda.*")
        shutil.copytree(ROOT / name, source / name, ignore=leftovers)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w"]
    run = subprocess.run(
        [*command, str(folder), str(source)],
        env={**os.environ, "FASTMETA_EXTENSION": "", "FASTMETA_CUDA": "0", **environment},
        capture_output=True,
        text=True,
    )
    return run, list(folder.glob("*.whl"))


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        pytest.param(
            {"CC": "/nonexistent", "CXX": "/nonexistent"}, "no C++ compiler", id="no compiler"
        ),
        pytest.param({"CC": "false", "CXX": "false"}, "'false' failed", id="compiler fails"),
        pytest.param({"FASTMETA_EXTENSION": "0"}, "on request", id="left out"),
    ],
)
def test_wheel_without_the_extension(tmp_path, environment, reason):
    run, wheels = build_wheel(tmp_path, **environment)
    assert run.returncode == 0, run.stderr
    with zipfile.ZipFile(wheels[0]) as wheel:
        names = wheel.namelist()
        record = json.loads(wheel.read("fastmeta/_build.json"))
    assert not [name for name in names if name.startswith("fastmeta/_C")]
    assert "fastmeta/py.typed" in names
    assert "fastmeta/kernels/convolutions.py" in names
    assert record["built"] is False
    assert reason in record["reason"]
    assert "pip install" in record["remedy"]


def test_wheel_that_must_have_the_extension_fails_without(tmp_path):
    run, wheels = build_wheel(
        tmp_path, FASTMETA_EXTENSION="1", CC="/nonexistent", CXX="/nonexistent"
    )
    assert run.returncode != 0
    assert wheels == []
    assert "no C++ compiler" in run.stdout + run.stderr
