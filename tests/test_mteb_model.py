"""Laws of mteb_model.py that need no mteb: what MTEB is given, over ranks too, and where its results lie."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_ranks
from scoring import WordEncoder

import e5core.mteb_model as room
from e5core.distributed import ALONE, World
from e5core.evaluate import main
from e5core.mteb_model import Leader, MtebModel, TaskFailure, identify, results_folder
from e5core.trained import revision_of


@dataclass
class Metadata:
    """What the model reads of mteb.TaskMetadata."""

    name: str
    type: str
    prompt: str | dict[str, str] | None = None


def asked(metadata: Metadata, prompt_type: str | None, given: dict[str, str] | None = None) -> tuple:
    """Embed two batches as MTEB does.  Returns what the encoder was asked."""
    encoder = WordEncoder()
    model = MtebModel(encoder.encode, None, given or {})
    batches = [{"id": ["1", "2"], "text": ["one tram", "two trams"]}, {"id": ["3"], "text": ["a tree"]}]
    vectors = model.encode(
        batches, task_metadata=metadata, hf_split="test", hf_subset="en", prompt_type=prompt_type, batch_size=2
    )
    [(texts, task, normalize)] = encoder.calls
    assert texts == ["one tram", "two trams", "a tree"]
    np.testing.assert_array_equal(vectors, WordEncoder().encode(texts, task, normalize))
    return task, normalize


def test_the_instruction_stands_on_queries_only_in_retrieval_and_on_all_texts_elsewhere() -> None:
    scifact = "Given a scientific claim, retrieve documents that support or refute the claim"
    assert asked(Metadata("SciFact", "Retrieval"), "query") == (scifact, True)
    assert asked(Metadata("SciFact", "Retrieval"), "document") == (None, True)
    ubuntu = "Retrieve duplicate questions from AskUbuntu forum"
    assert asked(Metadata("AskUbuntuDupQuestions", "Reranking"), "document") == (ubuntu, True)
    assert asked(Metadata("Other", "STS", "MTEB's own"), "document") == ("MTEB's own", True)
    intents = "Given a online banking query, find the corresponding intents"
    assert asked(Metadata("Banking77Classification", "Classification"), None) == (intents, False)
    assert asked(Metadata("SciFact", "Retrieval"), "query", {"SciFact": ""}) == (None, True)


def test_similarities_are_cosines_also_of_one_vector_and_of_vectors_of_any_length() -> None:
    generator = np.random.default_rng(0)
    one, other = generator.normal(size=(3, 8)), generator.normal(size=(5, 8))
    cosines = (one @ other.T) / np.linalg.norm(one, axis=1)[:, None] / np.linalg.norm(other, axis=1)
    model = MtebModel(WordEncoder().encode, None, {})
    np.testing.assert_allclose(model.similarity(one, torch.tensor(other)), cosines, atol=1e-6)
    np.testing.assert_allclose(model.similarity(one[0], other), cosines[:1], atol=1e-6)
    np.testing.assert_allclose(model.similarity_pairwise(one, other[:3]), np.diag(cosines), atol=1e-6)


def embed_led(world: World) -> list:
    """Have rank 0 embed three times, the last time in vain.  Returns what this rank has embedded."""
    encoder = WordEncoder(dim=8)

    def encode(texts: Sequence[str], task: str | None, normalize: bool) -> np.ndarray:
        if "bad" in texts and world.is_main:
            raise FloatingPointError("as of a broken model")
        return encoder.encode(texts, task, normalize)

    leader = Leader(encode, world)
    if world.is_main:
        leader.encode(["straße\n", "\ud83d"], "Sort.", False)
        leader.encode([], None, True)
        leader.check()
        with pytest.raises(FloatingPointError):
            leader.encode(["bad"], None, True)
        for again in (leader.check, lambda: leader.encode(["good"], None, True)):
            with pytest.raises(TaskFailure, match="rank 0 failed while the ranks embedded together"):
                again()
        leader.end()
    else:
        leader.follow()
    return encoder.calls


def test_the_other_ranks_embed_what_rank_0_embeds_and_no_error_lets_them_fall_out_of_step() -> None:
    first, second = run_ranks(2, embed_led)
    assert first == [(["straße\n", "\ud83d"], "Sort.", False), ([], None, True)]
    assert second == [*first, (["bad"], None, True)]


def test_one_rank_goes_on_after_a_text_that_cannot_be_embedded() -> None:
    def encode(texts: Sequence[str], task: str | None, normalize: bool) -> np.ndarray:
        if texts == ["bad"]:
            raise FloatingPointError("as of a broken model")
        return np.ones((len(texts), 2), dtype=np.float32)

    leader = Leader(encode, ALONE)
    with pytest.raises(FloatingPointError):
        leader.encode(["bad"], None, True)
    leader.check()
    assert leader.encode(["good"], None, True).shape == (1, 2)


def test_results_lie_with_the_run_and_other_weights_or_settings_lie_apart(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step, weights in ((1, b"one"), (2, b"other")):
        folder = run / f"step_{step}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
        (folder / "adapter_config.json").write_text("{}")
        (folder / "adapter_model.safetensors").write_bytes(weights)
    (run / "config.toml").write_text("")
    assert results_folder(str(run), None) == results_folder(str(run / "step_1"), None) == run / "mteb"
    assert results_folder(str(run / "x.gguf"), tmp_path) == tmp_path
    assert revision_of(str(run)) == revision_of(str(run / "step_2")) != revision_of(str(run / "step_1"))
    assert revision_of(str(run)).startswith("step_2-")
    own = identify(str(run / "step_1"), 8, 512, {"max_tokens": None, "dtype": "auto"})
    assert (own.name, own.settings) == ("e5core/run", {})
    assert identify(str(run), 8, 64, {"max_tokens": 64, "dtype": "float32"}).settings == {
        "max_tokens": 64,
        "dtype": "float32",
    }


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    [line] = capsys.readouterr().err.splitlines()
    return line


def test_what_mteb_needs_is_said_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "say where: --mteb-folder DIR" in refused(capsys, tmp_path / "m.gguf", "--mteb", "mteb-en")

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    for version, said in ((missing, "the package mteb"), (lambda name: "1.39.7", "mteb 2, got 1.39.7")):
        monkeypatch.setattr(room, "version", version)
        assert f"--mteb needs {said}: pip install 'e5core[mteb]'" in refused(capsys, tmp_path, "--mteb", "mteb-en")
    unknown = refused(capsys, tmp_path, "--sts", tmp_path / "a.jsonl", "--task", "b=Sort.")
    assert "--task names the unknown set 'b'; known: a" in unknown
