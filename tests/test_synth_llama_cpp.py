"""A real server of a real model: llama.cpp (PyPI's xllamacpp) with SmolLM2-135M writes records over HTTP.

A model of that size rarely keeps to what it is asked, so how much is accepted is shown and not asserted.
"""

import asyncio
import re
from collections import Counter
from pathlib import Path

import pytest

import e5core.synth.prompts
from e5core.config import load_config
from e5core.records import read_records
from e5core.synth.generate import Outcome, Run
from e5core.synth.ledger import BudgetSpent
from e5core.synth.outputs import write_outputs
from e5core.synth.settings import SynthConfig

TWO_STEPS = ("short_long", "long_short", "short_short", "long_long")
KINDS = (*TWO_STEPS, "sts", "bitext")
N_TASKS = 3  # asked of a list: a long list would be cut off
CONFIG = """
[synth]
out = "{out}"
n_records = 60
examples_per_task = 0.333
[[models]]
name = "smollm2"
base_url = "{url}/v1"
api_key_env = ""
json_schema = true
max_output_tokens = 64
[limits]
concurrency = 4
timeout_s = 300.0
[budget]
requests = 112
[languages]
English = 1.0
German = 1.0
"""


def test_a_real_model_answers_every_kind_and_every_reply_ends_as_a_record_or_a_counted_reject(
    tmp_path: Path, smollm2_file: Path
) -> None:
    xllamacpp = pytest.importorskip("xllamacpp", reason="pip install -e '.[test]' brings llama.cpp")
    kinds = Path(e5core.synth.prompts.__file__).with_name("kinds")
    for name in TWO_STEPS:  # a folder of the user's own, too
        (tmp_path / f"{name}.toml").write_text(
            re.sub(r"n_tasks = \d+", f"n_tasks = {N_TASKS}", (kinds / f"{name}.toml").read_text())
        )
    params = xllamacpp.CommonParams()
    params.model.path = str(smollm2_file)
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 4 * 1024, 4, False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1  # its threads spin while they wait for each other
    server = xllamacpp.Server(params)
    path = tmp_path / "synth.toml"
    tables = "".join(f'[[kinds]]\nname = "{name}"\nfolder = "{tmp_path}"\n' for name in KINDS)
    path.write_text(CONFIG.format(out=tmp_path / "out", url=server.listening_address) + tables)

    async def collect() -> None:
        async for outcome in run.outcomes():
            outcomes.append(outcome)

    outcomes: list[Outcome] = []
    with Run(load_config(SynthConfig, path)) as run:
        with pytest.raises(BudgetSpent):
            asyncio.run(collect())
        n_written, left_out = write_outputs(run)
        counted = Counter[str]()
        for count in run.store.counts():
            counted[count.stream] += count.n
        spent = run.ledger.spent
    asked = Counter(outcome.ask.kind.name for outcome in outcomes)
    assert min(asked[kind] for kind in KINDS) >= 10, asked
    assert not any(outcome.again for outcome in outcomes)
    assert counted.total() == len(outcomes) == spent.requests == 112
    assert counted["records"] == sum(outcome.record is not None for outcome in outcomes) == n_written
    assert spent.input_tokens > 50 * len(outcomes) and 0 < spent.output_tokens <= 64 * len(outcomes)
    if n_written:
        assert len(read_records([tmp_path / "out" / "records.jsonl"])[0]) == n_written
    print(dict(counted), dict(left_out), Counter(outcome.reason for outcome in outcomes))
