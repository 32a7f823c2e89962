"""The store's index: where the answer to each request is, and what can be asked of all answers without reading them.

It holds nothing that the shards do not hold, so a damaged one, or one that knows more than the shards do, is made anew.
SQLite keeps it on the disk and in little memory, whatever its size.
"""

import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from e5core.contamination import normalised
from e5core.synth.duplicates import record_hash
from e5core.synth.shards import Place

VERSION = 1  # of the tables
TABLES = """
CREATE TABLE answers (
    key TEXT PRIMARY KEY, stream TEXT, shard INTEGER, start INTEGER, size INTEGER,
    kind TEXT, model TEXT, language TEXT, reason TEXT, content BLOB
) WITHOUT ROWID;
CREATE INDEX contents ON answers (content) WHERE content IS NOT NULL;
CREATE TABLE tasks (
    kind TEXT, form TEXT, key TEXT, position INTEGER, task TEXT, PRIMARY KEY (kind, form)
) WITHOUT ROWID;
CREATE INDEX task_order ON tasks (kind, key, position);
CREATE TABLE pool (kind TEXT, number INTEGER, task TEXT, PRIMARY KEY (kind, number)) WITHOUT ROWID;
CREATE TABLE shards (stream TEXT, shard INTEGER, size INTEGER, PRIMARY KEY (stream, shard)) WITHOUT ROWID;
"""
NEW_TASK = """
INSERT INTO tasks VALUES (?, ?, ?, ?, ?) ON CONFLICT (kind, form) DO UPDATE
SET key = excluded.key, position = excluded.position, task = excluded.task
WHERE (excluded.key, excluded.position) < (tasks.key, tasks.position)
"""
POOL = "INSERT INTO pool SELECT kind, row_number() OVER (ORDER BY key, position) - 1, task FROM tasks WHERE kind = ?"
COUNTS = """
SELECT CASE WHEN stream = 'records' AND reason <> '' THEN 'rejects' ELSE stream END,
kind, language, model, reason, count(*)
FROM answers GROUP BY 1, 2, 3, 4, 5 ORDER BY 1, 2, 3, 4, 5
"""


@dataclass(frozen=True, slots=True)
class Count:
    """How many answers are alike in all this."""

    stream: str  # records, tasks or rejects; a record that gave way to a smaller key is among the rejects
    kind: str  # name of the Kind that asked
    language: str
    model: str
    reason: str  # why it is a reject; else ""
    n: int


class Index:
    """The index of one store."""

    def __init__(self, path: Path, size_of: Callable[[str, int], int]) -> None:
        """Open the file, or begin an empty one.

        size_of: bytes of a (stream, shard); an index that knows of more is stale.
        """
        self._base = _opened(path, size_of) or _new(path)
        rows = self._base.execute("SELECT count(*) FROM answers WHERE stream = 'records' AND reason = ''")
        self.n_records: int = rows.fetchone()[0]  # survivors

    def close(self) -> None:
        """Let go of the file; what was not committed is forgotten."""
        self._base.close()

    def commit(self) -> None:
        """Keep what was noted."""
        self._base.commit()

    def has(self, key: str) -> bool:
        """Say whether a request was answered."""
        return self._base.execute("SELECT 1 FROM answers WHERE key = ?", (key,)).fetchone() is not None

    def holder(self, content: bytes) -> str:
        """Return the smallest key of a record with these texts, which is the one that survives; "" if there is none."""
        return self._base.execute("SELECT min(key) FROM answers WHERE content = ?", (content,)).fetchone()[0] or ""

    def size(self, stream: str, shard: int) -> int:
        """Return how many bytes of a shard are known."""
        rows = self._base.execute("SELECT size FROM shards WHERE stream = ? AND shard = ?", (stream, shard))
        return (rows.fetchone() or (0,))[0]

    def note(self, stream: str, place: Place, line: dict[str, object]) -> None:
        """Take in one line of a stream.  Raises sqlite3.IntegrityError if its key is there already."""
        key, content, reason, holder = str(line["id"]), None, line.get("reason", ""), ""
        if stream == "records":
            content = record_hash(line)
            holder = self.holder(content)
            if holder:  # of a larger key, or the store would not have taken this line
                self._base.execute("UPDATE answers SET reason = 'duplicate' WHERE key = ?", (holder,))
        row = (key, stream, *place, asked(line), line["source"], line.get("language", ""), reason, content)
        self._base.execute("INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
        self.n_records += stream == "records" and not holder
        for position, task in enumerate(line["tasks"] if stream == "tasks" else ()):
            self._base.execute(NEW_TASK, (line["kind"], normalised(task), key, position, task))
        shard, start, size = place
        self._base.execute("INSERT OR REPLACE INTO shards VALUES (?, ?, ?)", (stream, shard, start + size))

    def survivors(self) -> Iterator[Place]:
        """Yield the places of the surviving records by rising key."""
        return iter(
            self._base.execute(
                "SELECT shard, start, size FROM answers WHERE stream = 'records' AND reason = '' ORDER BY key"
            )
        )

    def counts(self) -> list[Count]:
        """Count all answers."""
        return [Count(*row) for row in self._base.execute(COUNTS)]

    def n_tasks(self, kind: str) -> int:
        """Return how many distinct tasks of a kind are there."""
        return self._base.execute("SELECT count(*) FROM tasks WHERE kind = ?", (kind,)).fetchone()[0]

    def close_pool(self, kind: str) -> int:
        """Number the distinct tasks of a kind, by request key and place in the reply, and return how many they are."""
        self._base.execute("DELETE FROM pool WHERE kind = ?", (kind,))
        n_tasks = self._base.execute(POOL, (kind,)).rowcount
        self.commit()
        return n_tasks

    def task(self, kind: str, number: int) -> str:
        """Return a numbered task.  Raises ValueError where there is none of that number."""
        rows = self._base.execute("SELECT task FROM pool WHERE kind = ? AND number = ?", (kind, number))
        row = rows.fetchone()
        if row is None:
            raise ValueError(f"the pool of {kind} has no task {number}; close_pool says how many there are")
        return row[0]

    def forget_near(self) -> None:
        """Begin a search for near-duplicates."""
        self._base.execute("CREATE TEMP TABLE IF NOT EXISTS near (hash INTEGER PRIMARY KEY)")
        self._base.execute("DELETE FROM near")

    def near(self, hashes: list[int]) -> bool:
        """Say whether one of a record's near_hashes was seen; if none was, they are from now on."""
        rows = [(number - 2**63,) for number in hashes]
        if any(self._base.execute("SELECT 1 FROM near WHERE hash = ?", row).fetchone() for row in rows):
            return True
        self._base.executemany("INSERT OR IGNORE INTO near VALUES (?)", rows)
        return False


def asked(line: dict[str, object]) -> str:
    """Return the name of the kind whose wording asked for a line; a user's kind has another name than its records."""
    params = line.get("params")
    wording = params.get("wording", "") if isinstance(params, dict) else ""
    return str(wording).rpartition("/")[0] or str(line["kind"])


def _opened(path: Path, size_of: Callable[[str, int], int]) -> sqlite3.Connection | None:
    """Open an index that is whole and knows of nothing that the shards lack."""
    base = _connected(path)
    try:
        if base.execute("PRAGMA user_version").fetchone()[0] == VERSION:
            rows = base.execute("SELECT stream, shard, size FROM shards").fetchall()
            whole = base.execute("PRAGMA quick_check(1)").fetchone()[0] == "ok"
            if whole and all(size <= size_of(stream, shard) for stream, shard, size in rows):
                base.execute("PRAGMA synchronous = OFF")  # a killed process loses nothing that the system was given
                return base
    except sqlite3.DatabaseError:
        pass  # damaged, as by a loss of power
    base.close()
    return None


def _new(path: Path) -> sqlite3.Connection:
    path.unlink(missing_ok=True)  # SQLite drops a log whose file is gone
    base = _connected(path)
    base.execute("PRAGMA journal_mode = WAL")
    base.execute("PRAGMA synchronous = OFF")
    base.executescript(f"BEGIN; {TABLES} PRAGMA user_version = {VERSION}; COMMIT;")
    return base


def _connected(path: Path) -> sqlite3.Connection:
    try:
        return sqlite3.connect(path)
    except sqlite3.OperationalError as error:
        raise RuntimeError(f"{path} cannot be opened: {error}; the folder must be writable") from error
