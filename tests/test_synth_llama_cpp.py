"""A real server of a real model: llama.cpp (PyPI's xllamacpp) with SmolLM2-135M writes records over HTTP.

A model of that size rarely keeps to what it is asked, so how much is accepted is shown and not asserted.
"""

import asyncio
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import tomli_w

import e5core.synth.prompts
from e5core.config import load_config
from e5core.records import read_records
from e5core.synth.generate import Outcome, Run
from e5core.synth.outputs import write_outputs
from e5core.synth.settings import SynthConfig

TWO_STEPS = ("short_long", "long_short", "short_short", "long_long")
KINDS = (*TWO_STEPS, "sts", "bitext")
TASK = "Given a question, find the passage that answers it."
MOST_TOKENS = 48  # of a reply
CONFIG = """
[synth]
out = "{out}"
seed = 89  # draws every kind among 20, ten times among 62
n_records = {n}
examples_per_task = {per_task}
[[models]]
name = "smollm2"
base_url = "{url}/v1"
api_key_env = ""
json_schema = true
max_output_tokens = {most}
[limits]
concurrency = 4
timeout_s = 300.0
[budget]
requests = {requests}
[languages]
English = 1.0
German = 1.0
"""


@pytest.fixture(scope="module")
def url(smollm2_file: Path) -> Iterator[str]:
    xllamacpp = pytest.importorskip("xllamacpp", reason="pip install -e '.[test]' brings llama.cpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(smollm2_file)
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 4 * 1024, 4, False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1  # its threads spin while they wait for each other
    server = xllamacpp.Server(params)
    yield server.listening_address


def run_until_the_end(path: Path, why: str) -> tuple[list[Outcome], Counter[str]]:
    """Run to the end that `why` matches.  Returns the outcomes, and the store's answers by stream."""

    async def collect() -> None:
        async for outcome in run.outcomes():
            outcomes.append(outcome)

    outcomes: list[Outcome] = []
    with Run(load_config(SynthConfig, path)) as run:
        with pytest.raises(RuntimeError, match=why):
            asyncio.run(collect())
        counted = Counter[str]()
        for count in run.store.counts():
            counted[count.stream] += count.n
        spent = run.ledger.spent
        assert counted.total() == len(outcomes) == spent.requests and not any(outcome.again for outcome in outcomes)
        assert spent.input_tokens > 50 * len(outcomes) and 0 < spent.output_tokens <= MOST_TOKENS * len(outcomes)
        n_written, _ = write_outputs(run)
    n_accepted = sum(outcome.record is not None for outcome in outcomes)
    assert counted["records"] == n_written <= n_accepted  # some gave way to one with the same texts and a smaller key
    if n_written:
        assert len(read_records([run.out / "records.jsonl"])[0]) == n_written
    print(dict(counted), Counter(outcome.reason for outcome in outcomes))
    return outcomes, counted


@pytest.mark.parametrize(("n", "of_each"), [(20, 1), pytest.param(62, 10, marks=pytest.mark.slow)])
def test_a_real_model_is_asked_examples_of_every_kind_and_each_ends_as_a_record_or_a_counted_reject(
    n: int, of_each: int, tmp_path: Path, url: str
) -> None:
    kinds = Path(e5core.synth.prompts.__file__).with_name("kinds")
    for name in TWO_STEPS:  # kinds of the user's own: with one task, since what such a model brainstorms is chance
        fields = tomllib.loads((kinds / f"{name}.toml").read_text())
        del fields["brainstorm"]
        fields["task"] = TASK
        fields["generate"]["wordings"] = [text.replace("{task}", TASK) for text in fields["generate"]["wordings"]]
        (tmp_path / f"{name}.toml").write_text(tomli_w.dumps(fields))
    text = CONFIG.format(out=tmp_path / "out", n=n, per_task=1.0, url=url, most=MOST_TOKENS, requests=n)
    path = tmp_path / "synth.toml"
    path.write_text(text + "".join(f'[[kinds]]\nname = "{name}"\nfolder = "{tmp_path}"\n' for name in KINDS))
    outcomes, _ = run_until_the_end(path, f"budget.requests = {n} is spent")
    asked = Counter(outcome.ask.kind.name for outcome in outcomes)
    assert min(asked[kind] for kind in KINDS) >= of_each, asked


def test_a_real_model_s_lists_of_tasks_end_as_tasks_or_as_counted_rejects(tmp_path: Path, url: str) -> None:
    text = CONFIG.format(out=tmp_path / "out", n=4, per_task=0.025, url=url, most=MOST_TOKENS, requests=8)
    path = tmp_path / "synth.toml"
    path.write_text(text + "".join(f'[[kinds]]\nname = "{name}"\n' for name in TWO_STEPS))
    outcomes, counted = run_until_the_end(path, "budget.requests = 8 is spent|no task for kind")
    assert len(outcomes) == 8 == counted["tasks"] + counted["rejects"]
    assert {outcome.ask.prompt.step for outcome in outcomes} == {"brainstorm"}
