"""What README.md and docs/ quote must exist: error phrases, modules, options and linked files, read from the source."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"(?:python|torchrun)\b[^\n`#]*? -m ((?:e5core|bench)[\w.]*)([^\n`#]*)")
OPTION = re.compile(r"--[a-z][a-z-]*")
LINK = re.compile(r"\]\(([^)\s]+)\)")
WORDS = re.compile(r"[A-Za-z]{2,} [a-z]{2,}")  # less than that is said by the error that it passes on
FILE = re.compile(r"(?<![\w./-])(?:configs|tests|bench|e5core|kernels|csrc|docs|data)/[\w./-]*\w")
TO_COME = ("data/e5", "bench/results/DEVICE")  # what a reader fetches or makes
KEY = re.compile(r"(?<![\w./\[-])([a-z]+)\.(?!py\b|jsonl?\b|html\b|model\b|toml\b)([a-z_]+)(?=[`= ])")
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)
INTERNAL = {  # met by callers from Python that pass what e5core never does, or said in the middle of another message
    *("e5core/backbone.py:forward", "e5core/encoder.py:forward", "e5core/scores.py:_embed"),
    *("e5core/gguf_file.py:_aligned", "e5core/gguf_file.py:_named", "e5core/gguf_file.py:_read"),
    *("e5core/gguf_file.py:_read_array", "e5core/gguf_file.py:_read_value", "e5core/archives.py:readinto"),
    *("e5core/metrics.py:write", "e5core/metrics.py:step", "e5core/model_files.py:write_safetensors"),
    *("e5core/negatives.py:__init__", "e5core/recompute.py:apply_recompute"),
    *("e5core/sharding.py:__init__", "e5core/sharding.py:put"),
    *("e5core/synth/ledger.py:_count", "e5core/synth/ledger.py:reserve", "e5core/synth/ledger.py:settle"),
    *("e5core/synth/prompts.py:brainstorm_request", "e5core/synth/prompts.py:generate_request"),
    "e5core/synth/index.py:task",
}


@cache
def _strings(path: Path) -> tuple[str, ...]:
    """Return the string constants of a source file; those of an f-string are its fixed parts."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return tuple(n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str))


def _phrases() -> list[str]:
    """Return the first cells of troubleshooting.md's rows."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    return re.findall(r"^\| `([^`]+)` \|", page, flags=re.MULTILINE)


def _errors(file: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield "FILE:FUNCTION" and the fixed parts of the message for every error with words of its own."""

    def visit(node: ast.AST, function: str) -> Iterator[tuple[str, list[str]]]:
        name = node.name if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else function
        raised = isinstance(node, ast.Raise) and node.exc is not None
        if raised or (isinstance(node, ast.Call) and ast.unparse(node.func) == "parser.error"):
            words = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
            if any(map(WORDS.search, words)):
                yield f"{file.relative_to(ROOT).as_posix()}:{name}", words
        for child in ast.iter_child_nodes(node):
            yield from visit(child, name)

    yield from visit(ast.parse(file.read_text(encoding="utf-8")), "")


def _file_of(module: str) -> Path:
    """Return the file that `python -m module` would run, whether it is there or not."""
    path = ROOT.joinpath(*module.split("."))
    return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")


def _imported(file: Path) -> list[Path]:
    """Return the files of ours that a file imports; some of them add options to its parser."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    names = [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module is not None]
    return [path for name in names if name.startswith(("e5core", "bench")) and (path := _file_of(name)).is_file()]


def _commands(page: Path) -> list[tuple[str, set[str]]]:
    """Return the modules that a page runs, each with the options that follow it."""
    text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))
    return [(module, set(OPTION.findall(rest))) for module, rest in COMMAND.findall(text)]


def test_troubleshooting_quotes_only_phrases_of_the_source():
    """The first cell of a row is the phrase to search for."""
    phrases = _phrases()
    assert len(phrases) > 40 and min(map(len, phrases)) > 5
    files = [*ROOT.glob("e5core/**/*.py"), *ROOT.glob("kernels/**/*.py")]
    source = "\n".join(text for file in files for text in _strings(file))
    assert [phrase for phrase in phrases if phrase not in source] == []


def test_troubleshooting_has_a_row_for_every_error_that_a_user_can_meet():
    """The kernels' checks of tensors that e5core makes are none; nor are INTERNAL's."""
    phrases, seen, missing = _phrases(), set(), []
    for place, words in (found for file in sorted(ROOT.glob("e5core/**/*.py")) for found in _errors(file)):
        seen.add(place)
        if place not in INTERNAL and not any(phrase in text for phrase in phrases for text in words):
            missing.append((place, words))
    assert missing == []
    assert seen >= INTERNAL


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_name_modules_and_options_that_exist(page: Path):
    for module, options in _commands(page):
        file = _file_of(module)
        assert file.is_file(), f"{page.name}: no module {module}"
        words = {word for source in (file, *_imported(file)) for word in _strings(source)}
        # evaluate writes f"--{kind}" for the kinds that it names
        missing = {o for o in options - words if not ("--" in words and o[2:] in words)}
        assert not missing, f"{page.name}: {module} has no {sorted(missing)}"


def test_the_pages_hold_commands():
    """The law above would hold of nothing if the pattern found nothing."""
    assert {"e5core.train", "e5core.plan", "e5core.synth"} <= {m for page in PAGES for m, _ in _commands(page)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_resolve(page: Path):
    targets = [t.partition("#")[0] for t in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in t]
    assert [t for t in targets if t and not (page.parent / t).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path):
    """Also those outside links, as tests that show a law."""
    named = set(FILE.findall(page.read_text(encoding="utf-8")))
    missing = [name for name in named if not (ROOT / name).exists() and not name.startswith(TO_COME)]
    assert sorted(missing) == []


@cache
def _keys() -> dict[str, set[str]]:
    """Return the keys of each table, as the two configs that explain every key have them, set or behind a #."""
    tables: dict[str, set[str]] = {}
    for name in ("quickstart", "synth", "synth_domain"):
        keys: set[str] = set()
        for line in (ROOT / "configs" / f"{name}.toml").read_text(encoding="utf-8").splitlines():
            if table := re.match(r"(?:# )?\[+(?:[a-z_]+\.)?([a-z_]+)\]", line):
                keys = tables.setdefault(table[1], set())
            else:  # "epochs = 1.0  # or steps = N" names two
                keys.update(re.findall(r"(?:^|^# |# or |; or )([a-z_0-9]+) = ", line))
    return tables


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_that_are_named_exist(page: Path):
    """table.key, in prose or as an override."""
    named = KEY.findall(page.read_text(encoding="utf-8"))
    nested = {"sources", "sets", "report", "round_trip", "azure"}  # tables within a table
    assert {f"{t}.{k}" for t, k in named if t in _keys() and k not in _keys()[t] | nested} == set()


def test_the_pages_name_keys_and_files():
    """The laws above would hold of nothing if the patterns found nothing."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert ("batch", "negatives") in KEY.findall(text) and "tests/test_sharding.py" in FILE.findall(text)
    assert {"micro_batch_tokens", "size"} <= _keys()["batch"] and "money" in _keys()["budget"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_examples_import_what_exists(page: Path):
    for code in PYTHON.findall(page.read_text(encoding="utf-8")):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("e5core"):
                tree = ast.parse(_file_of(node.module).read_text(encoding="utf-8"))
                there = {n.name for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef)}
                there |= {a.name for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names}
                assert {alias.name for alias in node.names} <= there
