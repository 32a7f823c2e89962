"""What was answered, on disk: append-only JSON lines, and an index that can be made anew from them at any time.

    FOLDER/records/00000.jsonl ...   accepted records, as records.read_records takes them; id is the request's key
    FOLDER/tasks/00000.jsonl ...     brainstormed tasks, one reply a line
    FOLDER/rejects/00000.jsonl ...   replies that were not used, each with its reason
    FOLDER/index.sqlite              where each key's line is, hashes of contents, tasks in order

A line is written whole with its newline before the index hears of it. A process that is killed leaves at most one line
without a newline, which is cut off at the next opening, and lines that the index lacks, which it reads then. Every key
is answered once. Of records with the same texts the smallest key's survives, of tasks likewise, whichever came first:
the order of answers decides nothing. Memory does not grow with the store.
"""

import contextlib
import fcntl
import json
import os
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

from e5core.synth.duplicates import near_hashes, record_hash
from e5core.synth.index import Count, Index, asked
from e5core.synth.replies import Rejection
from e5core.synth.shards import Stream

STREAMS = ("records", "tasks", "rejects")
COMMIT_EVERY = 256  # answers; what the index has not committed is read again from the shards


class Store:
    """The answers of a run; one process at a time writes them."""

    def __init__(self, folder: Path, *, shard_bytes: int = 64 * 2**20) -> None:
        """Open a folder's store, or make one; repair what a killed process left.

        shard_bytes: at this size a new file is begun.
        Raises RuntimeError if another process has it open, or if a shard holds a line that is none of ours.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._n_pending = 0
        with contextlib.ExitStack() as opened:
            opened.callback(os.close, _locked(folder))
            self._streams = {name: Stream(folder / name, shard_bytes) for name in STREAMS}
            for stream in self._streams.values():
                opened.callback(stream.close)
            self._index = Index(folder / "index.sqlite", lambda stream, shard: self._streams[stream].size(shard))
            opened.callback(self._index.close)
            self._catch_up()
            self._opened = opened.pop_all()  # what stays open from here on; an error above has let go of it
        self._closed = False

    def __enter__(self) -> "Store":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Bring everything to the disk and let go of the folder."""
        if not self._closed:
            for stream in self._streams.values():
                stream.sync()
            self._index.commit()
            self._let_go()

    def has(self, key: str) -> bool:
        """Say whether a request was answered: by a record, by tasks or by a rejection."""
        return self._index.has(key)

    def add_record(self, key: str, fields: dict[str, object], *, model: str) -> bool:
        """Keep a record of checks.check_record.

        Returns False if a record with a smaller key has the same texts: this one is then rejected as its duplicate.
        Raises ValueError if the key was answered before.
        """
        line = {**fields, "id": key, "source": model}
        holder = self._index.holder(record_hash(fields))
        if not holder or key < holder:
            self._add("records", key, line)
            return True
        text = json.dumps(fields["response"], ensure_ascii=False)
        reject, language = Rejection("duplicate", holder), str(fields["language"])
        self.add_reject(key, reject, kind=asked(line), model=model, text=text, language=language)
        return False

    def add_tasks(self, key: str, tasks: Sequence[str], *, kind: str, model: str) -> None:
        """Keep the tasks of checks.check_tasks for a kind.  Raises ValueError if the key was answered before."""
        self._add("tasks", key, {"id": key, "kind": kind, "source": model, "tasks": list(tasks)})

    def add_reject(
        self, key: str, rejection: Rejection, *, kind: str, model: str, text: str, language: str = ""
    ) -> None:
        """Keep a reply that cannot be used, with its reason.  Raises ValueError if the key was answered before."""
        why = {"reason": rejection.reason, "detail": rejection.detail}
        self._add("rejects", key, {"id": key, "kind": kind, "source": model, "language": language, **why, "text": text})

    def close_pool(self, kind: str) -> int:
        """Number the distinct tasks of a kind once all were asked for: by request key, then by place in the reply.

        Returns how many there are; `task` takes numbers below that.
        """
        return self._index.close_pool(kind)

    def task(self, kind: str, number: int) -> str:
        """Return a task of a closed pool.  Raises ValueError where there is none of that number."""
        return self._index.task(kind, number)

    def n_tasks(self, kind: str) -> int:
        """Return how many distinct tasks of a kind are there so far."""
        return self._index.n_tasks(kind)

    @property
    def n_records(self) -> int:
        """How many records survive."""
        return self._index.n_records

    def counts(self) -> list[Count]:
        """Count all answers by stream, kind, language, model and reason; the same for any order of answers."""
        return self._index.counts()

    def records(self) -> Iterator[dict[str, object]]:
        """Yield the surviving records by rising key."""
        for place in self._index.survivors():
            yield json.loads(self._streams["records"].read(*place))

    def write_records(
        self, path: Path, *, drop: Callable[[dict[str, object]], str] | None = None, near_duplicates: bool = False
    ) -> tuple[int, Counter[str]]:
        """Write the surviving records by rising key to one file, whole or not at all.

        The file's bytes are the same for any order of answers.
        drop: returns the reason to leave a record out, or "".
        near_duplicates: leave out what nearly repeats a record with a smaller key.
        Returns how many were written, and how many were left out by reason.
        """
        n_written, dropped = 0, Counter[str]()
        self._index.forget_near()
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("wb") as file:
            for fields in self.records():
                reason = drop(fields) if drop else ""
                if not reason and near_duplicates and self._index.near(near_hashes(fields)):
                    reason = "near_duplicate"
                if reason:
                    dropped[reason] += 1
                    continue
                file.write(_encoded(fields))
                n_written += 1
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        return n_written, dropped

    def _add(self, stream: str, key: str, line: dict[str, object]) -> None:
        if not key or self.has(key):
            raise ValueError(f"request key {key!r} is empty or was answered before; ask `has` first")
        place = self._streams[stream].append(_encoded(line))
        try:
            self._index.note(stream, place, line)
            self._n_pending += 1
            if self._n_pending >= COMMIT_EVERY:
                self._index.commit()
                self._n_pending = 0
        except sqlite3.OperationalError as error:  # such as a full disk; to go on would ask for the same key twice
            self._let_go()
            raise RuntimeError(
                f"{self._folder}: the index cannot be written ({error}); mend that and start again, no answer is lost"
            ) from error

    def _catch_up(self) -> None:
        """Read what the index lacks, and cut torn lines off."""
        for name, stream in self._streams.items():
            for shard in stream.shards():
                for place, raw in stream.repaired(shard, self._index.size(name, shard)):
                    try:
                        self._index.note(name, place, json.loads(raw))
                    except (ValueError, KeyError, TypeError, AttributeError, sqlite3.IntegrityError) as error:
                        raise RuntimeError(
                            f"{stream.path(shard)}: the line at byte {place[1]} is damaged or stands twice ({error!r});"
                            " take it out and start again"
                        ) from error
        self._index.commit()

    def _let_go(self) -> None:
        self._opened.close()
        self._closed = True


def _locked(folder: Path) -> int:
    """Keep other processes out; the system lets go of the lock when this one ends, however it does."""
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise RuntimeError(f"{folder} is being written by another process; wait for its end, or stop it") from None
    return lock


def _encoded(line: dict[str, object]) -> bytes:
    # Half a surrogate pair of a rejected reply becomes an escape, which is how JSON spells it
    return json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
