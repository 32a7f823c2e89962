"""What README.md and docs/ quote must exist: error phrases, modules, options and linked files, read from the source."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"(?:python|torchrun)\b[^\n`#]*? -m ((?:e5core|bench)[\w.]*)([^\n`#]*)")
OPTION = re.compile(r"--[a-z][a-z-]*")
LINK = re.compile(r"\]\(([^)\s]+)\)")


@cache
def _strings(path: Path) -> tuple[str, ...]:
    """Return the string constants of a source file; those of an f-string are its fixed parts."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return tuple(n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str))


def _file_of(module: str) -> Path:
    """Return the file that `python -m module` would run, whether it is there or not."""
    path = ROOT.joinpath(*module.split("."))
    return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")


def _commands(page: Path) -> list[tuple[str, set[str]]]:
    """Return the modules that a page runs, each with the options that follow it."""
    text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))
    return [(module, set(OPTION.findall(rest))) for module, rest in COMMAND.findall(text)]


def test_troubleshooting_quotes_only_phrases_of_the_source():
    """The first cell of a row is the phrase to search for."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    phrases = re.findall(r"^\| `([^`]+)` \|", page, flags=re.MULTILINE)
    assert len(phrases) > 40
    files = [*ROOT.glob("e5core/**/*.py"), *ROOT.glob("kernels/**/*.py")]
    source = "\n".join(text for file in files for text in _strings(file))
    assert [phrase for phrase in phrases if phrase not in source] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_name_modules_and_options_that_exist(page: Path):
    for module, options in _commands(page):
        file = _file_of(module)
        assert file.is_file(), f"{page.name}: no module {module}"
        words = set(_strings(file))  # evaluate writes f"--{kind}" for the kinds that it names
        missing = {o for o in options - words if not ("--" in words and o[2:] in words)}
        assert not missing, f"{page.name}: {module} has no {sorted(missing)}"


def test_the_pages_hold_commands():
    """The law above would hold of nothing if the pattern found nothing."""
    assert {"e5core.train", "e5core.plan", "e5core.synth"} <= {m for page in PAGES for m, _ in _commands(page)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_resolve(page: Path):
    targets = [t.partition("#")[0] for t in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in t]
    assert [t for t in targets if t and not (page.parent / t).exists()] == []
