"""A manifest names whole lines that a growing file keeps; whoever reads by it gets these or a refusal."""

from pathlib import Path

import pytest

from e5core.manifest import Shard, added, check, manifest, new_lines


def write(file: Path, content: bytes) -> Path:
    file.write_bytes(content)
    return file


def append(file: Path, content: bytes) -> None:
    with file.open("ab") as opened:
        opened.write(content)


def test_a_folder_s_files_come_by_name_and_nothing_below_or_beside_them(tmp_path: Path) -> None:
    for name in ("00010.jsonl", "00002.jsonl", "a.jsonl", "notes.txt", "b.jsonl.gz", "c.jsonl.tmp", ".partial_e.jsonl"):
        write(tmp_path / name, b"1\n")
    (tmp_path / "below").mkdir()
    write(tmp_path / "below" / "d.jsonl", b"1\n")
    assert [Path(shard.path).name for shard in manifest(tmp_path)] == ["00002.jsonl", "00010.jsonl", "a.jsonl"]


@pytest.mark.parametrize("torn", [b"", b"{", b'{"a": "\xc3', b"x" * 100_000])
def test_a_line_without_its_newline_is_not_there(tmp_path: Path, torn: bytes) -> None:
    file = write(tmp_path / "a.jsonl", b"one\n\ntwo\n")
    [whole] = manifest(tmp_path)
    append(file, torn)
    assert manifest(tmp_path) == [whole] and whole.n_bytes == 9
    assert list(new_lines(whole, 0)) == [(1, b"one\n"), (3, b"two\n")]
    write(file, torn)
    assert manifest(tmp_path)[0].n_bytes == 0


def test_a_shard_reads_the_same_after_growth_and_the_growth_alone_from_where_it_ended(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", b"one\n")
    [early] = manifest(tmp_path)
    append(file, b"two\n \nthree\nfo")
    [late] = manifest(tmp_path)
    append(file, b"ur\n")
    assert list(new_lines(early, 0)) == [(1, b"one\n")]
    assert list(new_lines(late, early.n_bytes)) == [(2, b"two\n"), (4, b"three\n")]
    assert list(new_lines(late, late.n_bytes)) == []


def test_only_new_and_longer_files_are_added(tmp_path: Path) -> None:
    same, longer = write(tmp_path / "a.jsonl", b"1\n"), write(tmp_path / "b.jsonl", b"2\n")
    first = added(tmp_path, {})
    known = {shard.path: shard for shard in first}
    assert [shard.path for shard in first] == [str(same), str(longer)] and added(tmp_path, known) == []
    append(longer, b"3\n")
    new = write(tmp_path / "c.jsonl", b"4\n")
    elsewhere = Shard("elsewhere/a.jsonl", 5, "00")  # of another folder: not looked at
    assert [shard.path for shard in added(tmp_path, known | {elsewhere.path: elsewhere})] == [str(longer), str(new)]


CHANGES = {
    "a byte": lambda file: write(file, b"one\ntWo\n"),
    "a byte, and longer": lambda file: write(file, b"one\ntWo\nthree\n"),
    "shorter by a line": lambda file: write(file, b"one\n"),
    "shorter by a newline": lambda file: write(file, b"one\ntwo"),
    "joined with a later line": lambda file: write(file, b"one\ntwo and\n"),
    "gone": Path.unlink,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_file_is_refused_by_name(tmp_path: Path, change: str) -> None:
    file = write(tmp_path / "a.jsonl", b"one\ntwo\n")
    [shard] = manifest(tmp_path)
    check(shard)
    CHANGES[change](file)
    for refusing in (
        check,
        lambda shard: next(new_lines(shard, 4)),
        lambda shard: added(tmp_path, {shard.path: shard}),
    ):
        with pytest.raises(ValueError, match=r"a\.jsonl no longer begins with the 8 bytes"):
            refusing(shard)
