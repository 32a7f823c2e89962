"""Laws of synth's store, index and shards: nothing answered is lost, torn or kept twice, whenever a writer dies."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from e5core.records import read_records
from e5core.synth.replies import Rejection
from e5core.synth.store import Store

ROOT = Path(__file__).parents[1]
REJECT = Rejection("no_json", "prose")
WRITER = """
import sys
from pathlib import Path
from e5core.synth.replies import Rejection
from e5core.synth.store import Store

def fields(i):
    texts = {key: f"{key} of {i % 90} " + "filler " * (i % 90 % 7) * 40 for key in ("S1", "S2", "S3")}
    line = {"kind": "sts", "task": "Retrieve.", "language": "English", "params": {"wording": "sts/0"}}
    return {**line, "response": texts}

with Store(Path(sys.argv[1]), shard_bytes=20_000) as store:
    for i in range(int(sys.argv[2])):
        key = f"{(i * 7919) % 10007:05d}"
        if store.has(key):
            continue
        if i % 5 == 3:
            store.add_tasks(key, [f"Task {i}.", "Task of all.", f"TASK {i - 10}."], kind="short_long", model="m")
        elif i % 5 == 4:
            store.add_reject(key, Rejection("no_json"), kind="sts", model="m", text="prose")
        else:
            store.add_record(key, fields(i), model="m")
        print(key, flush=True)
"""


def fields(text: str, **more: object) -> dict[str, object]:
    response = {"S1": text, "S2": f"{text} again", "S3": f"not {text}"}
    line = {"kind": "sts", "task": "Retrieve.", "language": "English", "params": {"wording": "sts/1"}}
    return {**line, "response": response, **more}


def fill(store: Store, n: int, first: int = 0) -> None:
    for i in range(first, first + n):
        store.add_record(f"r{i:02d}", fields(f"text {i}"), model="m")
        store.add_tasks(f"t{i:02d}", [f"Task {i}.", f"Other {i}."], kind="short_long", model="m")
        store.add_reject(f"x{i:02d}", REJECT, kind="sts", model="m", text=f"prose {i}")


def contents(store: Store, folder: Path) -> tuple[bytes, list[str], list[object]]:
    """All that a run leaves: the file of records, the pool, the counts."""
    store.write_records(folder / "out.jsonl")
    tasks = [store.task("short_long", i) for i in range(store.close_pool("short_long"))]
    return (folder / "out.jsonl").read_bytes(), tasks, list(store.counts())


def whole_lines(folder: Path) -> list[dict]:
    """Every line of every shard; fails on one that is torn."""
    found = []
    for path in sorted(folder.glob("*/*.jsonl")):
        raw = path.read_bytes()
        assert raw == b"" or raw.endswith(b"\n"), path
        found += [json.loads(line) for line in raw.split(b"\n") if line]
    return found


def test_shards_are_read_as_records_with_key_and_model(tmp_path: Path) -> None:
    with Store(tmp_path / "s", shard_bytes=400) as store:
        for i in range(5):
            assert store.add_record(f"k{i}", fields(f"Grüße 犬 \u2028 {i}"), model="gpt")
    paths = sorted((tmp_path / "s/records").glob("*.jsonl"))
    assert len(paths) > 1  # shards are begun anew at their size
    records, _ = read_records(paths)
    assert [(r.id, r.source, r.query, r.kind) for r in records] == [
        (f"k{i}", "gpt", f"Grüße 犬 \u2028 {i}", "sts") for i in range(5)
    ]


def test_what_was_answered_is_known_after_reopening(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        fill(store, 3)
        before = contents(store, tmp_path)
        assert (store.n_records, store.n_tasks("short_long"), store.n_tasks("long_long")) == (3, 6, 0)
    with Store(tmp_path) as store:
        assert [store.has(key) for key in ("r00", "t01", "x02", "r03", "")] == [True, True, True, False, False]
        assert contents(store, tmp_path) == before and store.n_records == 3
        assert [record["id"] for record in store.records()] == ["r00", "r01", "r02"]


def test_a_key_is_answered_once(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        fill(store, 1)
        for key in ("r00", "t00", "x00", ""):
            with pytest.raises(ValueError, match="is empty or was answered before"):
                store.add_record(key, fields("new"), model="m")
            with pytest.raises(ValueError, match="is empty or was answered before"):
                store.add_reject(key, REJECT, kind="sts", model="m", text="")
    assert len(whole_lines(tmp_path)) == 3


def test_one_process_writes_at_a_time(tmp_path: Path) -> None:
    with Store(tmp_path):
        with pytest.raises(RuntimeError, match="is being written by another process"):
            Store(tmp_path)
    Store(tmp_path).close()


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))), ids=str)
def test_the_order_of_answers_decides_nothing(tmp_path: Path, order: tuple[int, ...]) -> None:
    answers: list[Callable[[Store], object]] = [
        lambda store: store.add_record("k1", fields("A dog"), model="m"),
        lambda store: store.add_record("k2", fields("a DOG", language="German"), model="n"),
        lambda store: (
            store.add_record("k3", fields("A  dog"), model="m"),
            store.add_tasks("t1", ["Find a law.", "Find a cat."], kind="short_long", model="m"),
        ),
        lambda store: (
            store.add_record("k0", fields("b"), model="m"),
            store.add_tasks("t0", ["Find a dog.", "find a CAT.", "Find a law"], kind="short_long", model="m"),
        ),
    ]
    with Store(tmp_path) as store:
        for i in order:
            answers[i](store)
        records, tasks, counts = contents(store, tmp_path)
        assert store.n_records == 2
    assert [json.loads(line)["id"] for line in records.splitlines()] == ["k0", "k1"]
    assert tasks == ["Find a dog.", "find a CAT.", "Find a law", "Find a law."]
    assert [(c.stream, c.kind, c.language, c.model, c.reason, c.n) for c in counts] == [
        ("records", "sts", "English", "m", "", 2),
        ("rejects", "sts", "English", "m", "duplicate", 1),
        ("rejects", "sts", "German", "n", "duplicate", 1),
        ("tasks", "short_long", "", "m", "", 2),
    ]
    (tmp_path / "index.sqlite").unlink()
    with Store(tmp_path) as store:
        assert contents(store, tmp_path) == (records, tasks, counts)


def test_a_duplicate_says_so_and_its_text_is_kept_among_the_rejects(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        assert store.add_record("k1", fields("A dog"), model="m") is True
        assert store.add_record("k2", fields("a dog"), model="m") is False
        assert store.add_record("k0", fields("a  dog"), model="m") is True  # the smaller key takes its place
        assert store.n_records == 1
    with Store(tmp_path) as store:
        assert store.n_records == 1
    [reject] = [line for line in whole_lines(tmp_path) if line.get("reason")]
    assert (reject["id"], reject["reason"], reject["detail"], reject["kind"]) == ("k2", "duplicate", "k1", "sts")
    assert json.loads(reject["text"])["S1"] == "a dog"


@pytest.mark.parametrize("index", ["ahead", "behind", "absent"])
@pytest.mark.parametrize("stream", ["records", "tasks", "rejects"])
def test_a_shard_cut_at_any_byte_opens_whole_and_goes_on_to_the_same_end(
    tmp_path: Path, stream: str, index: str
) -> None:
    full, early = tmp_path / "full", tmp_path / "early"
    with Store(full) as store:
        fill(store, 2)
    shutil.copytree(full, early)
    with Store(full) as store:
        fill(store, 1, first=2)
        expected = contents(store, tmp_path)
    shard = full / stream / "00000.jsonl"
    raw = shard.read_bytes()
    start = raw.rindex(b"\n", 0, -1) - 3  # the last line and the end of another
    key = {"records": "r", "tasks": "t", "rejects": "x"}[stream]
    # A killed writer leaves its index behind the shards, or level with them; the rest is what a loss of power may do
    for size in range(start, len(raw) + 1, 1 if index == "behind" else 5):
        cut = tmp_path / "cut"
        shutil.rmtree(cut, ignore_errors=True)
        shutil.copytree(full, cut)
        os.truncate(cut / stream / "00000.jsonl", size)
        if index != "ahead":
            (cut / "index.sqlite").unlink()
        if index == "behind":
            shutil.copy(early / "index.sqlite", cut)
        with Store(cut) as store:
            n_whole = raw[:size].count(b"\n")
            assert [store.has(f"{key}{i:02d}") for i in range(3)] == [i < n_whole for i in range(3)]
            assert len(whole_lines(cut)) == 6 + n_whole
            for i in range(n_whole, 3):
                if stream == "records":
                    store.add_record(f"r{i:02d}", fields(f"text {i}"), model="m")
                elif stream == "tasks":
                    store.add_tasks(f"t{i:02d}", [f"Task {i}.", f"Other {i}."], kind="short_long", model="m")
                else:
                    store.add_reject(f"x{i:02d}", REJECT, kind="sts", model="m", text=f"prose {i}")
            assert contents(store, tmp_path) == expected
        assert (cut / stream / "00000.jsonl").read_bytes() == raw


@pytest.mark.parametrize("damage", ["noise", "page", "log", "cut", "empty", "version"])
def test_a_damaged_index_is_made_anew(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "index.sqlite"
    with Store(tmp_path) as store:
        fill(store, 30)
        expected = contents(store, tmp_path)
        log = path.with_name("index.sqlite-wal").read_bytes()
    raw = bytearray(path.read_bytes())
    if damage == "log":  # of a killed process, while the file is damaged
        path.with_name("index.sqlite-wal").write_bytes(log)
    if damage == "version":
        raw[60:64] = (77).to_bytes(4, "big")  # where SQLite keeps user_version
    spoilt = {"noise": (100, len(raw)), "log": (100, len(raw)), "page": (4096, 8192)}  # page: of answers
    for place in range(*spoilt.get(damage, (0, 0)), 37):
        raw[place] ^= 0x5A
    path.write_bytes(raw[: {"cut": 5000, "empty": 0}.get(damage, len(raw))])
    with Store(tmp_path) as store:
        assert contents(store, tmp_path) == expected and store.has("r29")
    assert path.read_bytes()[60:64] == (1).to_bytes(4, "big")


def test_a_damaged_line_is_named_and_nothing_is_thrown_away(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        fill(store, 3)
    shard = tmp_path / "records/00000.jsonl"
    raw = shard.read_bytes()
    first = raw.index(b"\n") + 1
    for spoilt in (raw[:first] + b"#" + raw[first:], raw + raw[:first], raw[:first] + b'{"id": "q"}\n'):
        shard.write_bytes(spoilt)
        (tmp_path / "index.sqlite").unlink()
        with pytest.raises(RuntimeError, match=r"00000\.jsonl: the line at byte \d+ is damaged or stands twice"):
            Store(tmp_path)
        assert shard.read_bytes() == spoilt
    shard.write_bytes(raw)
    Store(tmp_path).close()  # the refusals left no lock behind


def write(folder: Path, n: int) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WRITER, str(folder), str(n)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def test_a_killed_writer_loses_nothing_it_reported_and_ends_at_the_same_store(tmp_path: Path) -> None:
    n, rng = 400, random.Random(3)
    undisturbed = write(tmp_path / "calm", n)
    keys = undisturbed.communicate(timeout=120)[0].split()
    assert undisturbed.returncode == 0 and len(keys) == n
    reported: list[str] = []
    for kill in range(6):
        writer = write(tmp_path / "killed", n)
        assert writer.stdout is not None
        lines = (line.strip() for line in writer.stdout)
        reported += itertools.islice(lines, rng.randrange(1, n // 8))
        os.kill(writer.pid, signal.SIGKILL)
        reported += lines  # what it said before it died
        assert writer.wait() == -signal.SIGKILL, f"kill {kill} came too late"
        with Store(tmp_path / "killed", shard_bytes=20_000) as store:
            assert all(store.has(key) for key in reported)
        ids = [line["id"] for line in whole_lines(tmp_path / "killed")]
        assert len(ids) == len(set(ids)) and set(reported) <= set(ids) and len(ids) <= len(reported) + kill + 1
    assert write(tmp_path / "killed", n).wait(timeout=120) == 0
    ends = []
    for name in ("calm", "killed"):
        with Store(tmp_path / name) as store:
            ends.append(contents(store, tmp_path))
    assert ends[0] == ends[1] and len(ends[0][0].splitlines()) == 54  # of 240 records, the others are duplicates


def test_records_are_written_by_rising_key_less_what_is_dropped(tmp_path: Path) -> None:
    long = " ".join(f"word{i}" for i in range(80))
    with Store(tmp_path / "s") as store:
        texts = {"c": long, "a": long + " end", "b": "quite another", "d": "test set", "0": long + " start"}
        for key, text in texts.items():
            store.add_record(key, fields(text), model="m")

        def drop(line: dict[str, object]) -> str:
            return "contaminated" if line["id"] in "d0" else ""  # what is dropped drops no other

        path = tmp_path / "out.jsonl"
        assert store.write_records(path) == (5, {})
        assert [record.id for record in read_records([path])[0]] == ["0", "a", "b", "c", "d"]
        for _ in range(2):  # the second time finds no traces of the first
            assert store.write_records(path, drop=drop, near_duplicates=True) == (
                2,
                {"contaminated": 2, "near_duplicate": 1},
            )
            assert [record.id for record in read_records([path])[0]] == ["a", "b"]
        before = path.read_bytes()
        with pytest.raises(ZeroDivisionError):
            store.write_records(path, drop=lambda line: str(1 // 0))
        assert path.read_bytes() == before
        assert not store.add_record("e", fields("quite another"), model="m")  # the store goes on


def test_a_users_kind_is_counted_by_its_own_name(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.add_record("a", fields("x", params={"wording": "law/2"}), model="m")
        store.add_record("b", fields("y", params={}), model="m")
        assert sorted(count.kind for count in store.counts()) == ["law", "sts"]


def test_text_that_is_no_unicode_is_kept_as_a_reject(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.add_reject("a", REJECT, kind="sts", model="m", text="half \ud800 pair")
        store.add_reject("b", REJECT, kind="sts", model="m", text="\u2028\x85\x00 odd line ends\r\n")
    texts = [line["text"] for line in whole_lines(tmp_path)]
    assert texts == ["half \ud800 pair", "\u2028\x85\x00 odd line ends\r\n"]


def test_a_pool_is_numbered_by_key_and_can_be_closed_again(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.add_tasks("b", ["B one.", "B two."], kind="sts", model="m")
        assert store.close_pool("sts") == 2 and store.close_pool("long_long") == 0
        store.add_tasks("a", ["A one.", "b ONE."], kind="sts", model="m")
        assert store.close_pool("sts") == 3
        assert [store.task("sts", i) for i in range(3)] == ["A one.", "b ONE.", "B two."]
        with pytest.raises(ValueError, match="has no task 3"):
            store.task("sts", 3)


def test_a_full_disk_leaves_the_store_as_it_was(tmp_path: Path) -> None:
    program = f"""
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from e5core.synth.replies import Rejection
from e5core.synth.store import Store
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = Store(Path({str(tmp_path)!r}))
store.add_reject("a", Rejection("no_json"), kind="sts", model="m", text="x" * 100)
store.close()
store = Store(Path({str(tmp_path)!r}))
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))  # a write beyond it comes back short, then fails
for key, size in (("b", 600_000), ("c", 50)):
    try:
        store.add_reject(key, Rejection("no_json"), kind="sts", model="m", text="x" * size)
    except OSError as error:
        print(key, error.strerror)
store.close()
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout) == (0, "b File too large\n"), run.stderr
    assert [line["id"] for line in whole_lines(tmp_path)] == ["a", "c"]


def test_an_index_that_cannot_be_written_stops_the_run_and_loses_no_answer(tmp_path: Path) -> None:
    program = f"""
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from e5core.synth.replies import Rejection
from e5core.synth.store import Store
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = Store(Path({str(tmp_path)!r}), shard_bytes=20_000)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))  # shards stay below it
n = 0
try:
    while True:
        store.add_reject(f"{{n:06d}}", Rejection("no_json"), kind="sts", model="m", text="")
        n += 1
except RuntimeError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
with Store(Path({str(tmp_path)!r})) as again:  # the refused store has let go of its lock
    print(n > 256, all(again.has(f"{{i:06d}}") for i in range(n + 1)))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0 and "the index cannot be written" in run.stdout, run.stderr
    assert run.stdout.endswith("True True\n")


def test_memory_does_not_grow_with_the_store(tmp_path: Path) -> None:
    program = """
import resource, sys
from pathlib import Path
from e5core.synth.store import Store
with Store(Path(sys.argv[1])) as store:
    for i in range(int(sys.argv[2])):
        texts = {"S1": f"text {i}", "S2": f"other {i} " * 60, "S3": "third"}
        line = {"kind": "sts", "task": "T", "language": "English", "params": {}, "response": texts}
        store.add_record(f"{i * 7919 % 1000003:07d}", line, model="m")
    store.write_records(Path(sys.argv[1]) / "out.jsonl")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    peaks = []
    for n in (1000, 12_000):
        command = [sys.executable, "-c", program, str(tmp_path / str(n)), str(n)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
        peaks.append(int(run.stdout))
    assert peaks[1] - peaks[0] < 6 * 1024, f"{peaks} KiB for 12 times the records"  # their text alone is 9 MiB
