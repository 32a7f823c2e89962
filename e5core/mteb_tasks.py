"""What a model is told in MTEB's tasks, as data (mteb_tasks.toml), and the names of groups of tasks.

The instruction of a task is the first of these: what the caller gives, the paper's (arXiv 2401.00368, table 15), MTEB's
own, that of its kind (Retrieval, STS, ...). In retrieval and reranking it stands before queries only, apart from the
paper's own reranking tasks, and elsewhere before all texts. This room does not need MTEB (mteb_model.py does).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

from e5core.config import load_config
from e5core.template import Template, evaluation_task


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskTable:
    """mteb_tasks.toml, which explains each key."""

    queries_only: tuple[str, ...]
    both_sides: tuple[str, ...]
    not_normalized: tuple[str, ...]
    groups: dict[str, tuple[str, ...]]
    kinds: dict[str, str]
    tasks: dict[str, str]


@dataclass(frozen=True, slots=True)
class Told:
    """How the texts of a task are embedded."""

    instruction: str  # "": none
    source: str  # whose it is
    on_documents: bool
    normalize: bool


@cache
def read_table() -> TaskTable:
    """Read mteb_tasks.toml, which is installed beside this file."""
    return load_config(TaskTable, Path(__file__).with_name("mteb_tasks.toml"))


def members(name: str) -> tuple[str, ...]:
    """Return MTEB's names in a group; a name that is no group stands for itself."""
    return read_table().groups.get(name, (name,))


def instruct(
    name: str,
    kind: str,
    own: str | Mapping[str, str] | None,
    given: Mapping[str, str],
    template: Template = "instruct",
) -> Told:
    """Say how the texts of a task are embedded.

    kind: MTEB's type of the task.  own: the instruction in MTEB's metadata, {"query": ...} where sides differ.
    given: instructions of the caller by task, "" for none.  template: the model's; with prefixes or bare queries, the
    kind alone decides, where nothing is given.
    Raises ValueError for a kind that is not known.
    """
    table = read_table()
    if kind not in table.kinds:
        raise ValueError(f"{name}: tasks of the kind {kind} are not for texts; known kinds: {', '.join(table.kinds)}")
    papers = next((text for pattern, text in table.tasks.items() if fnmatchcase(name, pattern)), None)
    mtebs = own.get("query") if isinstance(own, Mapping) else own
    if name in given:
        instruction, source = given[name], "yours"
    elif template != "instruct":
        instruction, source = evaluation_task(kind, table.kinds[kind], template), "of its kind"
    elif papers is not None:
        instruction, source = papers, "the paper's"
    elif mtebs:
        instruction, source = mtebs, "MTEB's"
    else:
        instruction, source = table.kinds[kind], f"of every {kind} without its own; --task {name}=TEXT gives another"
    both = kind not in table.queries_only or any(fnmatchcase(name, pattern) for pattern in table.both_sides)
    return Told(instruction, source, both, kind not in table.not_normalized)
