"""The config of a synthetic-data run is refused, with a reason, before anything is sent."""

from pathlib import Path

import pytest

from e5core.config import ConfigError, load_config, write_config
from e5core.synth.settings import SynthConfig

WHOLE = """
[synth]
out = "runs/synth"
n_records = 1000

[[models]]
name = "gpt-4o"
share = 0.75
price_in = 2.5
price_out = 10.0
[models.azure]
endpoint = "https://x.openai.azure.com"
deployment = "gpt-4o-eu"
api_version = "2024-10-21"

[[models]]
name = "local"
base_url = "http://localhost:8000/v1"
api_key_env = ""
share = 0.25
json_schema = true

[limits]
concurrency = 256
tokens_per_minute = 2e6

[budget]
money = 50.0

[[kinds]]
name = "sts"

[languages]
English = 0.9
German = 0.1
"""


def load(tmp_path: Path, text: str) -> SynthConfig:
    path = tmp_path / "synth.toml"
    path.write_text(text)
    return load_config(SynthConfig, path)


def test_a_whole_config_is_read_and_reads_back_equal(tmp_path: Path) -> None:
    config = load(tmp_path, WHOLE)
    assert [model.share for model in config.models] == [0.75, 0.25] and config.models[0].azure is not None
    assert config.languages == {"English": 0.9, "German": 0.1} and config.limits.requests_per_minute is None
    write_config(config, tmp_path / "resolved.toml")
    assert load_config(SynthConfig, tmp_path / "resolved.toml") == config


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('name = "local"', 'name = "gpt-4o"', "models: every name may stand once: got 'gpt-4o' 2 times"),
        ("money = 50.0", "tokens = 9", "budget.money is needed, since gpt-4o has a price"),
        ("price_in = 2.5\nprice_out = 10.0", "", "budget.money would never bind"),
        ("http://localhost:8000/v1", "localhost:8000", r"models\[1\]: base_url must be http\(s\)://HOST"),
        ("http://localhost:8000/v1", "http://u:hunter2@h/v1", r"models\[1\]: base_url must hold no user name"),
        ("https://x.openai.azure.com", "x.openai.azure.com", r"models\[0\].azure: endpoint must be http"),
        ('api_key_env = ""', 'api_key_env = "sk-hunter2"', r"models\[1\]: api_key_env must be the name of an env"),
        ("concurrency = 256", "concurrency = 0", "limits.concurrency: .*greater than or equal to 1"),
        ("share = 0.75", "share = 0", r"models\[0\].share: .*greater than 0"),
        ("concurrency", "concurency", "limits.concurency: unknown key.*nearest: concurrency"),
        ("German = 0.1", "German = -0.1", "languages.German: .*greater than 0"),
    ],
)
def test_a_wrong_config_is_refused_with_the_place_and_without_secrets(
    tmp_path: Path, old: str, new: str, said: str
) -> None:
    assert WHOLE.count(old) >= 1
    with pytest.raises(ConfigError, match=said) as error:
        load(tmp_path, WHOLE.replace(old, new, 1))
    assert "hunter2" not in str(error.value)
