"""MTEB's tasks run with a model of ours: `python -m e5core.evaluate MODEL --mteb GROUP_OR_TASK ...`.

    rank 0   MTEB: loads the data, asks for embeddings, scores, writes its own JSON -> FOLDER/results/NAME/REVISION/
    others   embed their share of what it asks for, and wait

Only rank 0 needs the data. What has a result already, of these weights and these settings, is not run again.
MTEB itself (the package mteb) is an extra, imported where it is asked for.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from e5core.distributed import World, log, patient, tell
from e5core.mteb_tasks import instruct, members, read_table
from e5core.records import nearest
from e5core.template import Template
from e5core.trained import home_of, revision_of

Encode = Callable[[Sequence[str], str | None, bool], np.ndarray]  # texts, instruction, normalize -> (N, D) float32
BATCH_SIZE = 1024  # texts that MTEB's loader hands over at a time; how they are packed is the encoder's


class TaskFailure(RuntimeError):
    """Tasks of MTEB that came to no score."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """Under which names MTEB keeps a model's results."""

    name: str  # ORGANISATION/MODEL
    revision: str  # other weights, another revision
    dim: int
    max_tokens: int
    settings: Mapping[str, str | float]  # that are not the model's own: its results lie apart, as MTEB's "experiments"


def results_folder(model: str, chosen: Path | None) -> Path:
    """Return where MTEB's results about a model lie: MODEL/mteb unless chosen.  Raises ValueError for a file."""
    home = home_of(model)
    if chosen is None and home is None:
        raise ValueError(f"{model} is no folder to keep MTEB's results in; say where: --mteb-folder DIR")
    return home / "mteb" if chosen is None else chosen


def identify(model: str, dim: int, max_tokens: int, settings: Mapping[str, str | float | None]) -> Identity:
    """Name a model by its path and weights.  settings: None and "auto" are the model's own."""
    own = {key: value for key, value in settings.items() if value not in (None, "auto")}
    name = f"e5core/{(home_of(model) or Path(model)).resolve().name}"
    return Identity(name=name, revision=revision_of(model), dim=dim, max_tokens=max_tokens, settings=own)


class MtebModel:
    """What MTEB takes for an encoder (its EncoderProtocol)."""

    def __init__(self, encode: Encode, meta: object, given: Mapping[str, str], template: Template = "instruct") -> None:
        """meta: mteb.ModelMeta.  given: instructions by task, instead of those that mteb_tasks.py finds."""
        self._encode, self._given, self._template = encode, given, template
        self.mteb_model_meta = meta

    def encode(
        self,
        inputs: Iterable[Mapping[str, Any]],
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: str | None = None,
        **_: object,
    ) -> np.ndarray:
        """Embed the texts of MTEB's loader.

        inputs: batches, {"text": [...]}.  prompt_type: "query", "document" or None where the task has no such sides.
        Returns (N, D) float32. The other arguments change nothing.
        """
        name, kind = task_metadata.name, task_metadata.type
        told = instruct(name, kind, task_metadata.prompt, self._given, self._template)
        bare = prompt_type == "document" and not told.on_documents
        texts = [text for batch in inputs for text in batch["text"]]
        return self._encode(texts, None if bare else told.instruction or None, told.normalize)

    def similarity(self, embeddings1: np.ndarray | Tensor, embeddings2: np.ndarray | Tensor) -> Tensor:
        """Return the cosine of each of N rows with each of M, (N, M) float32."""
        return _unit_rows(embeddings1) @ _unit_rows(embeddings2).T

    def similarity_pairwise(self, embeddings1: np.ndarray | Tensor, embeddings2: np.ndarray | Tensor) -> Tensor:
        """Return the cosine of each of N rows with the other's, (N,) float32."""
        return (_unit_rows(embeddings1) * _unit_rows(embeddings2)).sum(dim=-1)


class Leader:
    """Rank 0's encoder, which has the other ranks embed what it embeds; they need not know when that will be."""

    def __init__(self, encode: Encode, world: World) -> None:
        """encode: works on all ranks of `world` together, with the same texts."""
        self._own, self._waiting = encode, patient(world)
        self._in_step = True

    def encode(self, texts: Sequence[str], task: str | None, normalize: bool) -> np.ndarray:
        """Embed texts on all ranks, on rank 0.  Raises TaskFailure once an earlier call has failed."""
        self.check()
        self._in_step = False
        tell([list(texts), task, normalize], self._waiting)
        vectors = self._own(texts, task, normalize)
        self._in_step = True
        return vectors

    def check(self) -> None:
        """Raise TaskFailure where an embedding failed, for the others may still be at it, and would mix up two."""
        if not self._in_step and self._waiting.world_size > 1:
            raise TaskFailure("rank 0 failed while the ranks embedded together; its own error is above")

    def follow(self) -> None:
        """Embed what rank 0 embeds, on the others, until it ends."""
        while (asked := tell(None, self._waiting)) is not None:
            self._own(*asked)

    def end(self) -> None:
        """Let the others go, on rank 0."""
        tell(None, self._waiting)


def find_tasks(asked: Sequence[str], given: Mapping[str, str]) -> dict[str, list[Any]]:
    """Find MTEB's tasks by names of our groups, of its tasks and of its benchmarks.

    given: instructions by task.
    Returns mteb.AbsTask objects by the name that asked for them.  Raises ValueError where mteb is missing or of another
    version, on a name that is none, on a task of pictures or sounds, and on an instruction for a task that is none of
    these.
    """
    mteb = _mteb()
    found = {name: [task for own in members(name) for task in _named(mteb, own)] for name in asked}
    abouts = {task.metadata.name: task.metadata for tasks in found.values() for task in tasks}
    for about in abouts.values():
        if about.modalities != ["text"]:
            raise ValueError(f"--mteb: {about.name} is not of texts alone, but of {', '.join(about.modalities)}")
        instruct(about.name, about.type, about.prompt, given)
    for name in given:
        if name not in abouts:
            raise ValueError(f"--task names the unknown set {name!r}; {nearest(name, sorted(abouts))}")
    return found


def run_tasks(
    groups: Mapping[str, Sequence[Any]],
    encode: Encode,
    world: World,
    identity: Identity,
    folder: Path,
    given: Mapping[str, str],
    template: Template = "instruct",
) -> tuple[dict[str, float], dict[str, str]]:
    """Score tasks (find_tasks), each once, or take the scores that `folder` has of them.

    groups, identity, folder, given, template: looked at on rank 0 alone.  encode: works on all ranks together.
    Returns {"TASK/METRIC": percentage}, each group's means at the end, and {task: why it failed}; both are empty on
    other ranks than 0. A task that fails does not hold up the next.
    Raises TaskFailure where the ranks can no longer embed together.
    """
    leader = Leader(encode, world)
    if not world.is_main:
        leader.follow()
        return {}, {}
    scores: dict[str, float] = {}
    failures: dict[str, str] = {}
    for place, task in {_place(task): task for tasks in groups.values() for task in tasks}.items():
        about = task.metadata
        told = instruct(about.name, about.type, about.prompt, given, template)
        log(f"evaluating {about.name}; instruction, {told.source}: {told.instruction or 'none'}")
        try:
            scores[place] = 100.0 * _score(task, leader, identity, folder, given, template)
            log(f"{place} {scores[place]:.2f}")
        except TaskFailure as error:
            leader.check()
            failures[about.name] = str(error)
            log(f"failed: {error}")
    leader.end()
    return scores | _means(groups, scores), failures


def _place(task: Any) -> str:
    """Name a score: "STS17 en-en/cosine_spearman"; subsets and splits where a benchmark takes some of the task's."""
    about, taken = task.metadata, [task.metadata.name]
    if not task.is_aggregate:
        for own, every in ((task.hf_subsets, about.hf_subsets), (task.eval_splits, about.eval_splits)):
            taken += [] if set(own) == set(every) else ["+".join(own)]
    return f"{' '.join(taken)}/{about.main_score}"


def _means(groups: Mapping[str, Sequence[Any]], scores: Mapping[str, float]) -> dict[str, float]:
    """The means of each group over its kinds of tasks, as the paper's table 1 has them, and over all."""
    means: dict[str, float] = {}
    for name, tasks in groups.items():
        of_kinds: dict[str, list[float]] = {}
        for place, task in {_place(task): task for task in tasks}.items():
            if place in scores:
                of_kinds.setdefault(task.metadata.type, []).append(scores[place])
        every = [score for own in of_kinds.values() for score in own]
        listed = {**of_kinds, "tasks": every} if len(of_kinds) > 1 else of_kinds
        means |= {f"{name}, {len(own)} {kind}/mean": float(np.mean(own)) for kind, own in listed.items() if own[1:]}
    return means


def _score(
    task: Any, leader: Leader, identity: Identity, folder: Path, given: Mapping[str, str], template: Template
) -> float:
    """Return the main score of a task over the subsets that it asks for.  Raises TaskFailure."""
    mteb, name = _mteb(), task.metadata.name
    # Of a task of tasks with one missing MTEB would keep a result without a score, and never run it again.
    parts = [*task.metadata.tasks, task] if task.is_aggregate else [task]
    own = {part.metadata.name: given[name] for part in parts} if name in given else {}
    model = MtebModel(leader.encode, _meta(identity, own), own, template)
    results = mteb.ResultCache(folder)
    for part in parts:
        _drop_if_cut_off(results.get_task_result_path(part.metadata.name, model.mteb_model_meta))
        ran = mteb.evaluate(
            model,
            part,
            cache=results,
            raise_error=False,
            show_progress_bar=False,
            co2_tracker=False,
            encode_kwargs={"batch_size": BATCH_SIZE, "show_progress_bar": False},
        )
        if ran.exceptions:
            raise TaskFailure("; ".join(f"{each.task_name}: {each.exception}" for each in ran.exceptions))
    # The file may hold more subsets than are asked for here.
    return float(ran.task_results[0].validate_and_filter_scores(task).get_score())


def _drop_if_cut_off(path: Path) -> None:
    """Delete a result that a kill left half written, so that its task runs again."""
    if path.is_file():
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            log(f"{path} is cut off: deleted")
            path.unlink()


def _meta(identity: Identity, given: Mapping[str, str]) -> Any:
    settings = dict(identity.settings)
    if given:
        text = "\n".join(dict.fromkeys(given.values()))
        settings["instruction"] = hashlib.sha256(text.encode()).hexdigest()[:12]
    metas = import_module("mteb.models.model_meta")
    return metas.ModelMeta.create_empty({
        "name": identity.name,
        "revision": identity.revision,
        "embed_dim": identity.dim,
        "max_tokens": identity.max_tokens,
        "similarity_fn_name": metas.ScoringFunction.COSINE,
        "framework": ["PyTorch"],
        "use_instructions": True,
        "experiment_kwargs": settings or None,
    })  # fmt: skip


def _named(mteb: ModuleType, name: str) -> list[Any]:
    try:
        return [mteb.get_task(name)]
    except KeyError as unknown:
        try:
            return list(mteb.get_benchmark(name).tasks)
        except KeyError:
            said, groups = unknown.args[0].removeprefix("KeyError: "), ", ".join(read_table().groups)
            raise ValueError(f"--mteb: {said} Or name a benchmark of MTEB, or a group: {groups}") from None


def _mteb() -> ModuleType:
    """Import MTEB.  Raises ValueError where it is missing, or speaks another protocol."""
    try:
        found = version("mteb")
    except PackageNotFoundError:
        raise ValueError("--mteb needs the package mteb: pip install 'e5core[mteb]'") from None
    if not found.startswith("2."):
        raise ValueError(f"--mteb needs mteb 2, got {found}: pip install 'e5core[mteb]'")
    return import_module("mteb")


def _unit_rows(vectors: np.ndarray | Tensor) -> Tensor:
    return F.normalize(torch.atleast_2d(torch.as_tensor(vectors).float()), dim=-1)
