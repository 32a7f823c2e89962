"""Vectors in a file: cut off anywhere, gone on with to the same bytes; other work is refused by name."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from models import save_embedder
from ranks import run_ranks
from scoring import ROOT

import e5core.encode
import e5core.text_encoder
from e5core.distributed import ALONE, World, share
from e5core.encode import Encoder, encode_file
from e5core.vector_shards import VectorFile, quantise, scales_path

FORMS = ("float32", "float16", "int8")
each_form = pytest.mark.parametrize("form", FORMS)
SMALL_SHARDS = """
import sys, torch, e5core.encode, e5core.text_encoder
e5core.text_encoder.CHUNK = 16
torch.set_num_threads(1)
sys.exit(e5core.encode.main(sys.argv[1:]))
"""


def unit_rows(n: int, dim: int) -> np.ndarray:
    rows = np.random.default_rng(0).normal(size=(n, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def write(output: Path, vectors: np.ndarray, form: str, until: int | None = None, **made_of: str) -> None:
    with VectorFile(output, vectors.shape, form, made_of) as file:
        for first in range(file.n_done, len(vectors) if until is None else until, 10):
            file.append(vectors[first : first + 10])
        if until is None:
            file.finish()


@each_form
def test_vectors_come_back_within_what_their_form_can_hold(tmp_path: Path, form: str) -> None:
    vectors, output = unit_rows(35, 24), tmp_path / "v.npy"
    vectors[7] = 0
    write(output, vectors, form)
    stored = np.load(output, mmap_mode="r", allow_pickle=False)
    assert stored.shape == (35, 24) and str(stored.dtype) == form
    if form == "int8":
        scales = np.load(scales_path(output), mmap_mode="r")
        allowed = scales[:, None] * (0.5 + 1e-4)
        assert scales.dtype == np.float32 and np.all(np.abs(stored * scales[:, None] - vectors) <= allowed)
        assert np.all(np.abs(stored).max(axis=1)[np.arange(35) != 7] == 127)
    else:
        assert np.array_equal(stored, vectors.astype(form))
    assert {path.name for path in tmp_path.iterdir()} == {"v.npy"} | ({"v.scales.npy"} if form == "int8" else set())


def test_int8_keeps_the_cosines_of_real_dimensions() -> None:
    vectors = unit_rows(200, 576)
    whole, scales = quantise(vectors)
    decoded = whole * scales[:, None]
    cosines = (decoded * vectors).sum(axis=1) / np.linalg.norm(decoded, axis=1)
    assert cosines.min() > 0.9999


@each_form
@pytest.mark.parametrize("harm", ["none", "torn data", "torn journal", "flipped bit"])
def test_what_was_cut_off_goes_on_to_the_same_bytes(tmp_path: Path, form: str, harm: str) -> None:
    vectors, output = unit_rows(64, 24), tmp_path / "v.npy"
    write(tmp_path / "whole.npy", vectors, form)
    write(output, vectors, form, until=40)
    data, journal = tmp_path / ".partial_v.npy", tmp_path / ".partial_v.npy.jsonl"
    if harm == "torn data":
        os.truncate(data, data.stat().st_size - 7)
    elif harm == "torn journal":
        os.truncate(journal, journal.stat().st_size - 7)
    elif harm == "flipped bit":
        content = bytearray(data.read_bytes())
        content[-25 * 24] ^= 1
        data.write_bytes(content)
    n_bytes = data.stat().st_size
    with VectorFile(output, vectors.shape, form, {}) as file:
        assert file.n_done == {"none": 40, "flipped bit": {"int8": 10, "float16": 20, "float32": 30}[form]}.get(
            harm, 30
        )
        assert (data.stat().st_size < n_bytes) == (harm in ("torn journal", "flipped bit", "torn data"))
    write(output, vectors, form)
    assert output.read_bytes() == (tmp_path / "whole.npy").read_bytes()
    if form == "int8":
        assert scales_path(output).read_bytes() == scales_path(tmp_path / "whole.npy").read_bytes()


class Cut(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.mark.parametrize("n_calls", range(5))
@pytest.mark.parametrize("before", [False, True])
def test_a_cut_among_the_renames_of_int8_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_calls: int, before: bool
) -> None:
    """before: an earlier call's V.npy and scales are there; they must never be seen with the others' half."""
    vectors, output = unit_rows(64, 24), tmp_path / "v.npy"
    write(tmp_path / "whole.npy", vectors, "int8")
    wanted = [output.with_name("whole.npy").read_bytes(), scales_path(tmp_path / "whole.npy").read_bytes()]
    earlier = []
    if before:
        write(output, -vectors[::-1].copy(), "int8")
        earlier = [output.read_bytes(), scales_path(output).read_bytes()]
    left = [n_calls]

    def counted(call: Callable[..., None]) -> Callable[..., None]:
        def until_cut(*arguments: object, **options: object) -> None:
            if left[0] == 0:
                raise Cut
            left[0] -= 1
            call(*arguments, **options)

        return until_cut

    with monkeypatch.context() as patch, pytest.raises(Cut) if n_calls < 4 else nullcontext():
        with VectorFile(output, vectors.shape, "int8", {}) as file:
            for first in range(0, 64, 10):
                file.append(vectors[first : first + 10])
            patch.setattr("os.replace", counted(os.replace))
            patch.setattr(Path, "unlink", counted(Path.unlink))
            file.finish()
    if output.exists():
        assert [output.read_bytes(), scales_path(output).read_bytes()] in (wanted, earlier)
    if n_calls < 4:  # old vectors away, scales, vectors, journal away
        with VectorFile(output, vectors.shape, "int8", {}) as file:
            assert file.n_done == 64
            file.finish()
    assert [output.read_bytes(), scales_path(output).read_bytes()] == wanted
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".partial")]


def test_a_call_cut_off_behind_its_last_rename_is_in_no_other_s_way(tmp_path: Path) -> None:
    vectors, output = unit_rows(64, 24), tmp_path / "v.npy"
    write(output, vectors, "int8", model="a")
    line = {"shape": [64, 24], "vectors": "int8", "model": "a"}
    journal = tmp_path / ".partial_v.npy.jsonl"
    journal.write_text(json.dumps(line) + '\n{"naming": true}\n')
    write(output, vectors, "float32", model="b")
    assert np.array_equal(np.load(output), vectors)
    write(output, vectors, "int8", until=20, model="a")
    os.replace(tmp_path / ".partial_v.scales.npy", scales_path(output))
    with pytest.raises(ValueError, match="model was 'a', is 'c'"):
        journal.write_text(journal.read_text() + '{"naming": true}\n')
        VectorFile(output, vectors.shape, "int8", {"model": "c"})


def test_other_work_under_the_same_name_is_refused_by_name(tmp_path: Path) -> None:
    vectors, output = unit_rows(64, 24), tmp_path / "v.npy"
    write(output, vectors, "float32", until=40, model="a", texts="b")
    for form, made_of in (("float32", {"model": "c", "texts": "b"}), ("float16", {"model": "a", "texts": "b"})):
        with pytest.raises(ValueError, match="model was 'a', is 'c'|vectors was 'float32', is 'float16'"):
            VectorFile(output, vectors.shape, form, made_of)
    with VectorFile(output, vectors.shape, "float32", {"model": "a", "texts": "b"}) as file:
        assert file.n_done == 40


def test_a_damaged_journal_is_named(tmp_path: Path) -> None:
    vectors, output = unit_rows(64, 24), tmp_path / "v.npy"
    write(output, vectors, "float32", until=40, model="a")
    journal = tmp_path / ".partial_v.npy.jsonl"
    journal.write_text("{" + journal.read_text())
    with pytest.raises(ValueError, match=r"\.partial_v\.npy\.jsonl is damaged .* delete it to begin"):
        VectorFile(output, vectors.shape, "float32", {"model": "a"})


def encode_on_rank(world: World, model: str, source: str, output: str, n_shards: int) -> None:
    """Encode by small shards; n_shards: after so many rank 0 kills all with SIGKILL, whatever they do; 0: none."""
    encoder = Encoder.load(model, dtype="float32", world=world)
    encoder.chunk = 16 * world.world_size
    pids = share(os.getpid(), world)
    append = VectorFile.append

    def kill_behind(file: VectorFile, vectors: np.ndarray) -> None:
        append(file, vectors)
        if file.n_done == n_shards * encoder.chunk:
            for pid in reversed(pids):
                os.kill(pid, signal.SIGKILL)

    VectorFile.append = kill_behind
    try:
        encode_file(encoder, Path(source), Path(output), None, "int8")
    finally:
        VectorFile.append = append


def encode_then_be_killed(world: World, model: str, source: str, whole: str, cut_off: str) -> None:
    encode_on_rank(world, model, source, whole, 0)
    encode_on_rank(world, model, source, cut_off, 4)


def test_two_ranks_killed_by_kill_9_go_on_to_the_same_bytes_and_one_rank_to_the_same_vectors(tmp_path: Path) -> None:
    model, source = save_embedder(tmp_path / "model"), tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": f"text {i} " + "word " * (i % 37)}) + "\n" for i in range(300)))
    paths = {name: tmp_path / f"{name}.npy" for name in ("whole", "two", "one")}
    with pytest.raises(AssertionError, match="ended without a word"):
        run_ranks(2, encode_then_be_killed, str(model), str(source), str(paths["whole"]), str(paths["two"]))
    assert paths["whole"].exists() and not paths["two"].exists()
    journal = (tmp_path / ".partial_two.npy.jsonl").read_text().splitlines()
    assert [json.loads(line)["rows"] for line in journal[1:]] == [32] * 4
    for partial in tmp_path.glob(".partial_two*"):
        shutil.copyfile(partial, partial.with_name(partial.name.replace("two", "one")))
    run_ranks(2, encode_on_rank, str(model), str(source), str(paths["two"]), 0)
    encode_on_rank(ALONE, str(model), str(source), str(paths["one"]), 0)
    assert paths["two"].read_bytes() == paths["whole"].read_bytes()
    assert scales_path(paths["two"]).read_bytes() == scales_path(paths["whole"]).read_bytes()
    one, whole = (np.load(paths[x]) * np.load(scales_path(paths[x]))[:, None] for x in ("one", "whole"))
    assert np.array_equal(one[:128], whole[:128]) and np.abs(one - whole).max() < 0.006  # a step of int8


def test_encode_killed_by_kill_9_goes_on_to_the_bytes_of_an_undisturbed_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, source = save_embedder(tmp_path / "model"), tmp_path / "texts.jsonl"
    lines = [json.dumps({"text": f"text {i} " + "word " * (i % 37)}) + "\n" for i in range(1000)]
    source.write_text("".join(lines))
    options = [str(model), "--dtype", "float32", "--vectors", "int8", "--input", str(source), "--output"]
    killed, whole = tmp_path / "killed.npy", tmp_path / "whole.npy"
    journal = tmp_path / ".partial_killed.npy.jsonl"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    with subprocess.Popen([sys.executable, "-c", SMALL_SHARDS, *options, str(killed)], env=environment) as process:
        deadline = time.monotonic() + 60
        while not (journal.is_file() and journal.read_text().count("\n") > 3):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert not killed.exists()
    monkeypatch.setattr(e5core.text_encoder, "CHUNK", 16)
    source.write_text("".join(lines[1:] + lines[:1]))
    assert e5core.encode.main([*options, str(killed)]) == 2
    assert "killed.npy was begun with other things: texts was" in capfd.readouterr().err
    source.write_text("".join(lines))
    other = save_embedder(tmp_path / "other", n_layers=3)
    assert e5core.encode.main([str(other), *options[1:], str(killed)]) == 2
    assert "begun with other things: model was" in capfd.readouterr().err
    assert e5core.encode.main([*options, str(killed)]) == 0
    assert "going on with" in capfd.readouterr().err
    assert e5core.encode.main([*options, str(whole)]) == 0
    assert killed.read_bytes() == whole.read_bytes()
    assert scales_path(killed).read_bytes() == scales_path(whole).read_bytes()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".partial")]
