"""The loss of a batch, by prefixes and with a teacher, against oracles that loop over texts in float64."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from loss_ranks import LOSSES, gradient_of_step, records, steps
from models import save_embedder
from ranks import run_ranks
from test_backbone import relative
from tiny_runs import CONFIG, SYNTHETIC
from torch import Tensor

from e5core.batches import BatchConfig, GlobalBatch, build_batch, text_hash
from e5core.config import ConfigError, load_config
from e5core.distributed import ALONE
from e5core.loss import LossConfig, infonce_loss
from e5core.mixture import DataConfig, load_mixture
from e5core.records import Record
from e5core.row_store import build_store, store_folder
from e5core.sources import Source
from e5core.tokenizer import Tokenizer
from e5core.train import Config, main

DIM = 24


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_embedder(tmp_path_factory.mktemp("embedder"))


def batch_of(embedder: Path) -> GlobalBatch:
    return build_batch(records(), Tokenizer.load(embedder), BatchConfig(max_tokens=60, negatives=3), seed=1, step=4)


def raw_rows(batch: GlobalBatch) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(len(batch.rows), DIM, generator=generator, dtype=torch.float64).requires_grad_()


def candidates_of(made: list[Record]) -> list[tuple[int, str]]:
    """(owner, text) of every candidate; records have one positive each."""
    return [(i, text) for i, record in enumerate(made) for text in (*record.positives, *record.negatives[:3])]


def cosine(x: Tensor, y: Tensor) -> Tensor:
    return torch.dot(x, y) / (x.square().sum().sqrt() * y.square().sum().sqrt())


def oracle(rows: Tensor, made: list[Record], n: int, temperature: float) -> Tensor:
    """The mean cross-entropy of the queries by the first n numbers of rows that nobody normalised."""
    found, losses = candidates_of(made), []
    for i, record in enumerate(made):
        own = {record.query, *record.positives}
        place = next(j for j, (owner, _) in enumerate(found) if owner == i)
        seen = [place]
        for j, (owner, text) in enumerate(found):
            if j != place and text not in own and (owner == i or (record.in_batch and made[owner].in_batch)):
                seen.append(j)
        logits = [cosine(rows[i, :n], rows[len(made) + j, :n]) / temperature for j in seen]
        losses.append(torch.nn.functional.cross_entropy(torch.stack(logits)[None], torch.tensor([0])))
    return torch.stack(losses).mean()


@pytest.mark.parametrize(
    ("dimensions", "weights"),
    [((DIM,), ()), ((5, DIM, 1), ()), ((8, 16), (3.0, 1.0)), ((7,), (2.0,))],
)
def test_matryoshka_is_the_mean_of_cross_entropies_over_renormalised_prefixes(
    dimensions: tuple[int, ...], weights: tuple[float, ...], embedder: Path
) -> None:
    batch, config = batch_of(embedder), LossConfig(temperature=0.1, matryoshka=dimensions, matryoshka_weights=weights)
    rows = raw_rows(batch)
    result = infonce_loss(torch.nn.functional.normalize(rows, dim=1), batch, config)
    shares = weights or (1.0,) * len(dimensions)
    parts = [share * oracle(rows, records(), n, 0.1) for n, share in zip(dimensions, shares, strict=True)]
    expected = sum(parts) / sum(shares)
    assert abs(result.loss.item() - expected.item()) < 1e-12
    gradients = [torch.autograd.grad(loss, rows)[0] for loss in (result.loss, expected)]
    assert relative(*gradients) < 1e-12
    assert gradients[1].abs().max() > 1e-3


def test_the_whole_as_its_only_prefix_is_the_plain_loss_to_the_bit(embedder: Path) -> None:
    batch = batch_of(embedder)
    unit = torch.nn.functional.normalize(raw_rows(batch).detach().float(), dim=1).requires_grad_()
    results = [infonce_loss(unit, batch, LossConfig(matryoshka=prefixes)) for prefixes in ((), (DIM,))]
    gradients = [torch.autograd.grad(result.loss, unit)[0] for result in results]
    assert torch.equal(results[0].loss, results[1].loss) and torch.equal(*gradients)


def test_accuracy_and_negatives_are_the_longest_prefix_s(embedder: Path) -> None:
    batch = batch_of(embedder)
    unit = torch.nn.functional.normalize(raw_rows(batch).detach(), dim=1)
    alone, both = (infonce_loss(unit, batch, LossConfig(margin=0.05, matryoshka=n)) for n in ((16,), (2, 16)))
    assert alone[1:] == both[1:]
    assert alone[1:] != infonce_loss(unit, batch, LossConfig(margin=0.05, matryoshka=(2,)))[1:]


def teacher_oracle(rows: Tensor, made: list[Record], n: int, temperature: float, teacher_temperature: float) -> Tensor:
    """The mean divergence over the queries' own candidates; of each record the scores begin with the one positive's."""
    found, divergences = candidates_of(made), []
    for i, record in enumerate(made):
        own = [j for j, (owner, _) in enumerate(found) if owner == i]
        student = torch.stack([cosine(rows[i, :n], rows[len(made) + j, :n]) for j in own]) / temperature
        teacher = torch.tensor(record.scores[: len(own)], dtype=torch.float64) / teacher_temperature
        likely = teacher.exp() / teacher.exp().sum()
        divergences.append((likely * (likely.log() - (student.exp() / student.exp().sum()).log())).sum())
    return torch.stack(divergences).mean()


@pytest.mark.parametrize(("dimensions", "weight"), [((), 0.7), ((DIM, 6), 2.0)])
def test_distillation_adds_the_divergence_from_the_teacher_by_its_weight(
    dimensions: tuple[int, ...], weight: float, embedder: Path
) -> None:
    batch = batch_of(embedder)
    config = LossConfig(temperature=0.3, matryoshka=dimensions, distillation=weight, teacher_temperature=0.5)
    rows = raw_rows(batch)
    result = infonce_loss(torch.nn.functional.normalize(rows, dim=1), batch, config)
    parts = [
        oracle(rows, records(), n, 0.3) + weight * teacher_oracle(rows, records(), n, 0.3, 0.5)
        for n in dimensions or (DIM,)
    ]
    expected = torch.stack(parts).mean()
    assert abs(result.loss.item() - expected.item()) < 1e-12
    gradients = [torch.autograd.grad(loss, rows)[0] for loss in (result.loss, expected)]
    assert relative(*gradients) < 1e-12


def test_a_student_that_says_what_the_teacher_says_loses_nothing_by_it(embedder: Path) -> None:
    batch = batch_of(embedder)
    unit = torch.nn.functional.normalize(raw_rows(batch).detach(), dim=1).requires_grad_()
    owners = batch.relations.owner.tolist()
    scores = [torch.dot(unit[i], unit[batch.n_queries + j]).item() for j, i in enumerate(owners)]
    same = LossConfig(temperature=0.02, distillation=1.0, teacher_temperature=0.02)
    found = [infonce_loss(unit, replace(batch, scores=scores), config) for config in (LossConfig(), same)]
    assert abs(found[0].loss.item() - found[1].loss.item()) < 1e-12
    gradients = [torch.autograd.grad(result.loss, unit)[0] for result in found]
    assert relative(*gradients) < 1e-12


def test_scores_beyond_any_likelihood_stay_finite_in_fp32(embedder: Path) -> None:
    batch = batch_of(embedder)
    unit = torch.nn.functional.normalize(raw_rows(batch).detach().float(), dim=1).requires_grad_()
    scores = [1e300 * (-1) ** j for j in range(len(batch.scores))]
    result = infonce_loss(unit, replace(batch, scores=scores), LossConfig(distillation=1.0))
    (gradient,) = torch.autograd.grad(result.loss, unit)
    assert result.loss.isfinite() and gradient.isfinite().all()


def test_each_candidate_takes_its_own_score_whichever_are_drawn(embedder: Path) -> None:
    made = Record(id="r", task="", query="q", positives=("p0", "p1"), negatives=("n0", "n1", "n2"), source="s")
    scored = {"p0": 0.0, "p1": 1.0, "n0": 2.0, "n1": 3.0, "n2": 4.0}
    tokenizer, seen = Tokenizer.load(embedder), set()
    for step in range(20):
        config = BatchConfig(max_tokens=60, negatives=2, choice="random")
        batch = build_batch([replace(made, scores=tuple(scored.values()))], tokenizer, config, seed=0, step=step)
        hashes = batch.relations.candidate_hashes.tolist()
        wanted = [score for text, score in scored.items() if text_hash(text) in hashes]
        assert batch.scores == wanted
        seen |= set(wanted)
        first_alone = build_batch([replace(made, scores=(0.0, 2.0, 3.0, 4.0))], tokenizer, config, seed=0, step=step)
        assert first_alone.scores == [None if score == 1.0 else score for score in wanted]
    assert seen == set(scored.values())


def write(path: Path, *lines: dict) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


WHOLE = {"query": "q", "pos": ["a", "b"], "neg": ["n"], "scores": [3, 2, 1]}
BARE = {"query": "q", "pos": ["a"], "neg": ["n"]}
HALF = {"query": "q", "pos": ["a", "b"], "neg": ["n"], "scores": [3, 1]}


@pytest.mark.parametrize(("bare", "has"), [(BARE, "0 teacher scores for 1"), (HALF, "2 teacher scores for 2")])
@pytest.mark.parametrize("kind", ["file", "folder", "store"])
def test_a_record_without_scores_is_refused_by_name(kind: str, bare: dict, has: str, tmp_path: Path) -> None:
    folder = tmp_path / "records"
    folder.mkdir()
    file = write(folder / "x.jsonl", *[WHOLE] * 4)
    source = Source(path=str(folder if kind == "folder" else file))
    config = DataConfig(sources=(source,), store=str(tmp_path / "stores") if kind == "store" else "")
    build = partial(build_store, store_folder(tmp_path / "stores", source), source, skip_broken=False, show=iter)
    if kind == "store":
        build()
    mixture, _ = load_mixture(config, 0, scored=True)
    mixture.batch(0, 4)
    with file.open("a") as lines:
        lines.write(json.dumps(bare) + "\n")
    if kind == "store":
        build()
    with pytest.raises(ValueError, match=f"record 'x:5' of x has {has} positives and 1 negatives, and loss.dist"):
        if kind == "folder":
            mixture.batch(1, 4)
        load_mixture(config, 0, scored=True)
    load_mixture(config, 0)


def test_a_loss_without_a_score_names_the_record(embedder: Path) -> None:
    made = records()
    made[2] = replace(made[2], scores=())
    tokenizer, config = Tokenizer.load(embedder), BatchConfig(max_tokens=60, negatives=3)
    batch = build_batch(made, tokenizer, config, seed=1, step=4)
    with pytest.raises(ValueError, match="needs a teacher's score of every candidate: records r2 lack some"):
        infonce_loss(raw_rows(batch), batch, LossConfig(distillation=1.0))


@pytest.fixture(scope="module")
def by_ranks(embedder: Path) -> list[list[tuple[float, Tensor]]]:
    return run_ranks(2, steps, str(embedder))


@pytest.mark.parametrize("case", range(len(LOSSES)))
def test_the_step_is_exact_for_any_micro_batch_and_any_number_of_ranks(
    case: int, embedder: Path, by_ranks: list[list[tuple[float, Tensor]]]
) -> None:
    loss, whole = gradient_of_step(ALONE, str(embedder), LOSSES[case], 100_000)
    plain, _ = gradient_of_step(ALONE, str(embedder), LossConfig(temperature=0.5), 100_000)
    assert abs(loss - plain) > 1e-3
    for found, gradient in (gradient_of_step(ALONE, str(embedder), LOSSES[case], 64), *(r[case] for r in by_ranks)):
        assert abs(found - loss) < 1e-12 * loss
        assert relative(torch.as_tensor(gradient), torch.as_tensor(whole)) < 1e-12


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loss.matryoshka=[8, 8]", "loss: matryoshka must name each number of dimensions once: got [8, 8]"),
        ("loss.matryoshka=[0, 8]", "loss.matryoshka[0]: input should be greater than or equal to 1"),
        ("loss.matryoshka_weights=[1.0]", "loss: matryoshka_weights must be one for each of matryoshka: got 1 for 0"),
        ("loss.distillation=0", "loss.distillation: input should be greater than 0"),
        ("loss.teacher_temperature=0.1", "loss: teacher_temperature is for distillation, which has no weight"),
        ("loss.distillation=1", "record 'en_sts:1' of en_sts has 0 teacher scores for 1 positives and 1 negatives"),
        ("loss.matryoshka=[16, 33]", "loss.matryoshka names 33 dimensions, and the model's embeddings have 32"),
    ],
)
def test_bad_settings_are_refused_by_name(
    override: str, message: str, embedder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.toml"
    file.write_text(CONFIG.format(run=tmp_path / "run", model=embedder, data=SYNTHETIC / "en_sts.jsonl"))
    assert main([str(file), override]) == 2
    assert message in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_prefix_longer_than_the_embeddings_is_refused(embedder: Path) -> None:
    batch = batch_of(embedder)
    with pytest.raises(ValueError, match="loss.matryoshka names 25 dimensions, and the model's embeddings have 24"):
        infonce_loss(raw_rows(batch), batch, LossConfig(matryoshka=(25,)))


def test_a_config_with_all_switches_is_kept_in_toml(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(CONFIG.format(run="r", model="m", data="d"))
    config = load_config(Config, file, ["loss.matryoshka=[8, 16]", "loss.matryoshka_weights=[1, 0.5]"])
    assert config.loss.prefixes(32) == [(16, pytest.approx(1 / 3)), (8, pytest.approx(2 / 3))]
    with pytest.raises(ConfigError, match="loss.matryoshka_weights"):
        load_config(Config, file, ["loss.matryoshka=[8, 16]", "loss.matryoshka_weights=[1, -1]"])
