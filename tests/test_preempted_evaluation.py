"""SIGTERM while a run is being scored: all ranks leave at the next micro-batch, and the scoring is taken up again."""

import json
from pathlib import Path

import pytest
from models import save_embedder
from preempted_ranks import interrupted, uninterrupted
from ranks import run_ranks
from tiny_runs import CONFIG, ROOT, SYNTHETIC, equal_bitwise, lines_of

from e5core.config import load_config
from e5core.distributed import ALONE
from e5core.train import Config, train


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preempted")
    model = save_embedder(folder / "model")
    pairs = (ROOT / "data/sts/stsb-cc-en/dev.jsonl").read_text().splitlines(keepends=True)[:40]
    (folder / "pairs.jsonl").write_text("".join(pairs))
    text = CONFIG.format(run=folder / "run", model=model, data=SYNTHETIC / "en_sts.jsonl").replace("= 48", "= 140")
    sets = f'[{{kind = "sts", path = "{folder}/pairs.jsonl"}}]'
    text += f'[eval]\nevery = 2\nmetric = "pairs/spearman"\nsets = {sets}\n'
    (folder / "config.toml").write_text(text)
    return folder / "config.toml"


@pytest.mark.parametrize(("world_size", "strategy"), [(1, "none"), (2, "none"), (2, "full")])
def test_an_evaluation_is_left_at_the_next_micro_batch_and_taken_up_again(
    world_size: int, strategy: str, config_file: Path
) -> None:
    run = config_file.parent / f"{world_size}-{strategy}"
    arguments = (str(config_file), str(run), strategy)
    counts = [interrupted(ALONE, *arguments)] if world_size == 1 else run_ranks(world_size, interrupted, *arguments)
    for own in counts:
        assert own[2] < own[0] or strategy == "none", counts  # where ranks hold the whole, the others end their pass
    assert counts[-1][2] == 2 < counts[-1][0] // 4, counts
    whole = config_file.parent / f"{world_size}-{strategy}-whole"
    held = [f"train.run='{whole}'", f'sharding.strategy="{strategy}"']
    if world_size == 1:
        train(load_config(Config, config_file, held))
    else:
        run_ranks(world_size, uninterrupted, str(config_file), held)
    assert lines_of(run) == lines_of(whole) and len(lines_of(run)) == 6
    assert sum("eval" in line for line in lines_of(run)) == 3
    assert equal_bitwise(run, whole, 6)
    best = [json.loads((folder / "best.json").read_text()) for folder in (run, whole)]
    assert best[0] == best[1] and not (run / "PREEMPTED").exists()
