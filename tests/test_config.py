"""Configs: what is refused, how it is said, and that what is written reads back equal."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from e5core.config import ConfigError, existing, load_config, read_json, write_config


@dataclass(frozen=True, kw_only=True, slots=True)
class Optim:
    lr: Annotated[float, Field(gt=0, le=1)] = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_steps: int = 100
    clip: float | None = None
    schedule: Literal["linear", "constant"] = "linear"

    def __post_init__(self) -> None:
        if self.betas[0] > self.betas[1]:
            raise ValueError(f"betas must rise: got {self.betas}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    path: Path
    weight: Annotated[float, Field(gt=0)] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    sources: tuple[Source, ...] = ()
    lengths: list[int] = field(default_factory=list)
    seed: int = 0
    limit: int | None = 5
    named: dict[str, Source] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    name: str = ""
    resume: bool = False
    rank: int | Literal["auto"] = "auto"
    second: Optim | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    model: Model = Model()
    optim: Optim = Optim()
    data: Data = Data()


def load(folder: Path, text: str, *overrides: str) -> Config:
    path = folder / "config.toml"
    path.write_text(text, encoding="utf-8")
    return load_config(Config, path, overrides)


def faults(folder: Path, text: str, *overrides: str) -> dict[str, str]:
    """The fault lines of a config that must fail: dotted path -> the rest of its line."""
    with pytest.raises(ConfigError) as caught:
        load(folder, text, *overrides)
    header, *lines = str(caught.value).split("\n  ")
    assert str(folder / "config.toml") in header and f"{len(lines)} fault" in header
    return dict(line.split(": ", 1) for line in lines)


def test_file_and_overrides_win_over_defaults_in_this_order(tmp_path: Path) -> None:
    text = "[optim]\nlr = 1\nclip = 2.5\n[[data.sources]]\npath = 'a.jsonl'\n[[data.sources]]\npath = 'b'\nweight = 2"
    config = load(tmp_path, text, "optim.clip=3.5", "optim.clip=4", "model.name=x/y-1", "data.lengths=[1, 2]")
    assert config == Config(
        model=Model(name="x/y-1"),
        optim=Optim(lr=1.0, clip=4.0),
        data=Data(sources=(Source(path=Path("a.jsonl")), Source(path=Path("b"), weight=2.0)), lengths=[1, 2]),
    )
    assert isinstance(config.optim.lr, float)


@pytest.mark.parametrize(
    "text, dotted, words",
    [
        ("[optim]\nlr = '1e-4'", "optim.lr", ["number", '"1e-4"']),
        ("[optim]\nlr = true", "optim.lr", ["number", "true"]),
        ("[optim]\nlr = 0.0", "optim.lr", ["greater than 0", "0.0"]),
        ("[optim]\nlr = 2", "optim.lr", ["less than or equal to 1", "got 2"]),
        ("[optim]\nlr = nan", "optim.lr", ["NaN"]),
        ("[optim]\nwarmup_steps = true", "optim.warmup_steps", ["integer", "true"]),
        ("[optim]\nwarmup_steps = 1.0", "optim.warmup_steps", ["integer", "1.0"]),
        ("[optim]\nbetas = [0.9]", "optim.betas[1]", ["missing"]),
        ("[optim]\nbetas = [0.9, 0.5]", "optim", ["betas must rise: got (0.9, 0.5)"]),
        ("[optim]\nschedule = 'cosine'", "optim.schedule", ["'linear' or 'constant'", '"cosine"']),
        ("optim = 3", "optim", ["object", "got 3"]),
        ("[model]\nname = 3", "model.name", ["string", "got 3"]),
        ("[model]\nresume = 'yes'", "model.resume", ["boolean", '"yes"']),
        ("[model]\nrank = 1.5", "model.rank", ["integer or input should be 'auto'", "1.5"]),
        ("[model.second]\nlr = -1", "model.second.lr", ["greater than 0"]),
        ("[[data.sources]]\npath='a'\n[[data.sources]]\nweight=1", "data.sources[1].path", ["missing", "path, weight"]),
        ("[[data.sources]]\npath='a'\nweight=-1", "data.sources[0].weight", ["greater than 0", "-1"]),
        ("[data.named.fever]\npath = 3", "data.named.fever.path", ["string", "got 3"]),
    ],
)
def test_wrong_value_is_named_with_path_value_and_what_is_allowed(
    tmp_path: Path, text: str, dotted: str, words: list[str]
) -> None:
    found = faults(tmp_path, text)
    assert list(found) == [dotted]
    for word in words:
        assert word in found[dotted]


@pytest.mark.parametrize(
    "number, shown", [("inf", "Infinity"), ("-inf", "-Infinity"), ("nan", "NaN"), ("1e999", "Inf")]
)
@pytest.mark.parametrize(
    "text, dotted",
    [
        ("[optim]\nclip = {}", "optim.clip"),
        ("[optim]\nbetas = [0.5, {}]", "optim.betas[1]"),
        ("[model.second]\nclip = {}", "model.second.clip"),
        ("[[data.sources]]\npath='a'\n[[data.sources]]\npath='b'\nweight = {}", "data.sources[1].weight"),
        ("[data.named.fever]\npath = 'a'\nweight = {}", "data.named.fever.weight"),
    ],
)
def test_number_that_is_not_finite_is_named_at_every_depth(
    tmp_path: Path, text: str, dotted: str, number: str, shown: str
) -> None:
    assert shown in faults(tmp_path, text.format(number))[dotted]


def test_override_and_huge_number_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    assert faults(tmp_path, "", "optim.clip=inf") == {"optim.clip": "must be a finite number; got Infinity"}
    assert list(faults(tmp_path, f"[optim]\nclip = 1{'0' * 400}")) == ["optim.clip"]
    assert load(tmp_path, "[optim]\nclip = 1e308\n[model]\nname = 'inf'").model.name == "inf"
    with pytest.raises(ConfigError, match="optim.clip: must be a finite number"):
        write_config(Config(optim=Optim(clip=float("inf"))), tmp_path / "out.toml")
    assert not (tmp_path / "out.toml").exists()


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", ":1: not JSON .Expecting value at column 1.;"),
        (b'{"a": 1,\n"b": [1,\n', ":3: not JSON .Expecting value at column 1.;"),
        (b'{"a": 1,\n"b" 2}', ":2: not JSON .Expecting ':' delimiter at column 5.;"),
        (b'{"a": 1,\n"b": "\xe9"}', ":2: not JSON .byte 15 is 0xe9, which is no UTF-8.;"),
        (b"[" * 100_000, ":1: not JSON .*recursion"),
        (b"1" * 5000, ":1: not JSON .*digits"),
    ],
)
def test_broken_json_is_named_by_file_and_line(tmp_path: Path, data: bytes, message: str) -> None:
    file = tmp_path / "x.json"
    file.write_bytes(data)
    with pytest.raises(ValueError, match=f"^{file}{message}"):
        read_json(file)


def test_json_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"é": [1, 2.5, null, true]}', encoding="utf-8")
    assert read_json(tmp_path / "x.json") == {"é": [1, 2.5, None, True]}


@pytest.mark.parametrize(
    "text, dotted, nearest, known",
    [
        ("optin = 1", "optin", "optim", "data, model, optim"),
        ("[optim]\nl_r = 1", "optim.l_r", "lr", "betas, clip, lr, schedule, warmup_steps"),
        ("[model.second]\nclipp = 1", "model.second.clipp", "clip", "betas, clip, lr, schedule, warmup_steps"),
        ("[[data.sources]]\npath='a'\npth='b'", "data.sources[0].pth", "path", "path, weight"),
        ("[data.named.fever]\npath='a'\nwait=1", "data.named.fever.wait", "weight", "path, weight"),
    ],
)
def test_unknown_key_is_refused_at_every_depth_with_the_nearest_known_one(
    tmp_path: Path, text: str, dotted: str, nearest: str, known: str
) -> None:
    found = faults(tmp_path, text)
    assert list(found) == [dotted]
    assert f"nearest: {nearest};" in found[dotted] and found[dotted].endswith(f"known keys: {known}")


def test_all_faults_are_reported_together(tmp_path: Path) -> None:
    found = faults(tmp_path, "x = 1\n[optim]\nlr = 'a'\nq = 1\n[data]\nseed = 1.5", "model.nam=3")
    assert set(found) == {"x", "optim.lr", "optim.q", "data.seed", "model.nam"}


@pytest.mark.parametrize("override", ["optim.lr", "=3", ".lr=1", "optim..lr=1", "optim lr=1", "optim.lr.x=1"])
def test_malformed_override_fails_like_the_file(tmp_path: Path, override: str) -> None:
    path = tmp_path / "config.toml"
    path.write_text("[optim]\nlr = 0.5")
    with pytest.raises(ConfigError, match="1 fault\n  override .*") as caught:
        load_config(Config, path, [override])
    assert override in str(caught.value)


def test_override_goes_through_tables_only(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text("[[data.sources]]\npath = 'a'")
    with pytest.raises(ConfigError, match="goes through data.sources, which is no table"):
        load_config(Config, path, ["data.sources.path=b"])


@pytest.mark.parametrize("value", ["a b", "x=y", "2026-01-01", "1\nseed=2", ""])
def test_override_that_is_no_toml_is_a_plain_string(tmp_path: Path, value: str) -> None:
    assert load(tmp_path, "", f"model.name={value}").model.name == value


@pytest.mark.parametrize("text, place", [("a = 1\nb = = 2", "line 2, column 5"), ("a = 1\nb = [1", "line 2, column 7")])
def test_broken_toml_is_named_by_file_line_and_column(tmp_path: Path, text: str, place: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert str(caught.value).startswith(f"{tmp_path / 'config.toml'}: not TOML: ") and place in str(caught.value)


def test_file_that_is_missing_or_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "quickstart.toml").write_text("")
    with pytest.raises(ConfigError, match="no such file .*quickstrat.toml; nearest in that folder: quickstart.toml"):
        load_config(Config, tmp_path / "quickstrat.toml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(Config, tmp_path)
    (tmp_path / "latin.toml").write_bytes(b"a = 'caf\xe9'")
    with pytest.raises(ConfigError, match="not UTF-8 text: byte 8 is 0xe9"):
        load_config(Config, tmp_path / "latin.toml")


def test_existing_names_the_nearest_file_or_the_missing_folder(tmp_path: Path) -> None:
    (tmp_path / "nli.jsonl").write_text("")
    assert existing(tmp_path / "nli.jsonl", "data.path") == tmp_path / "nli.jsonl"
    with pytest.raises(ConfigError, match=r"^data.sources\[0\].path: no such file .*nearest in that folder: nli.jsonl"):
        existing(tmp_path / "nil.jsonl", "data.sources[0].path")
    with pytest.raises(ConfigError, match=f"; {tmp_path}/a is not a folder"):
        existing(tmp_path / "a" / "b" / "c.jsonl", "data.path")


def test_written_config_reads_back_equal(tmp_path: Path) -> None:
    config = Config(
        model=Model(name='quote " and\nline \\ é', resume=True, rank=16, second=Optim(clip=1.0)),
        optim=Optim(lr=1e-7, betas=(0.0, 1e300)),
        data=Data(
            sources=(Source(path=Path("a/b.jsonl")), Source(path=Path("é"), weight=0.1)),
            lengths=[1, 2],
            named={"x.y z": Source(path=Path("q"))},
        ),
    )
    for each in (config, Config()):
        write_config(each, tmp_path / "out.toml")
        assert load_config(Config, tmp_path / "out.toml") == each
        assert [entry.name for entry in tmp_path.iterdir()] == ["out.toml"]


def test_config_that_toml_cannot_hold_is_refused_and_the_old_file_stays(tmp_path: Path) -> None:
    write_config(Config(), tmp_path / "out.toml")
    before = (tmp_path / "out.toml").read_bytes()
    with pytest.raises(ConfigError, match="data cannot be kept in TOML"):
        write_config(Config(data=Data(limit=None)), tmp_path / "out.toml")
    assert (tmp_path / "out.toml").read_bytes() == before


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    x: int
    y: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Named:
    name: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Layered:
    a: Pair
    b: tuple[Named, ...] = ()


def test_a_file_changes_single_keys_of_another_and_replaces_its_lists(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text('[a]\nx = 1\ny = 2\n[[b]]\nname = "p"\n[[b]]\nname = "q"\n')
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "top.toml").write_text('extends = "../base.toml"\n[a]\ny = 3\n[[b]]\nname = "r"\n')
    loaded = load_config(Layered, tmp_path / "sub" / "top.toml", ["a.x=5"])
    assert loaded == Layered(a=Pair(x=5, y=3), b=(Named(name="r"),))
    write_config(loaded, tmp_path / "whole.toml")
    assert "extends" not in (tmp_path / "whole.toml").read_text()
    (tmp_path / "base.toml").write_text('extends = "sub/top.toml"\n[a]\nz = 1\n')
    with pytest.raises(ConfigError, match=r"base\.toml: extends leads back to .*top\.toml; a file cannot extend"):
        load_config(Layered, tmp_path / "sub" / "top.toml")


def test_a_fault_names_the_file_that_holds_its_key(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text('[a]\nx = "one"\ny = 2\n')
    (tmp_path / "top.toml").write_text('extends = "base.toml"\n[a]\nz = 3\n')
    with pytest.raises(ConfigError) as caught:
        load_config(Layered, tmp_path / "top.toml")
    lines = str(caught.value).splitlines()
    assert any("a.x: " in line and line.endswith(f"(in {tmp_path / 'base.toml'})") for line in lines)
    assert any("a.z: unknown key" in line and not line.endswith(")") for line in lines)
    (tmp_path / "top.toml").write_text('extends = "bass.toml"\n')
    with pytest.raises(ConfigError, match=r"top\.toml: extends: no such file .* nearest in that folder: base\.toml"):
        load_config(Layered, tmp_path / "top.toml")
    (tmp_path / "top.toml").write_text("extends = 3\n")
    with pytest.raises(ConfigError, match="extends must name one file"):
        load_config(Layered, tmp_path / "top.toml")
