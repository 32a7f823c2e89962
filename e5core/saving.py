"""Saving while training goes on: the step waits for a copy to host memory only, a thread writes it (checkpoint.py).

One save is in flight at most. Rank 0's thread, its own part written, waits for the other ranks' parts by looking for
their small lists of files in the folder that all of them write to: a process group of its own would cost each rank a
second set of connections and hang with a rank that died, where looking for a file just ends. What a thread could not
write comes up on every rank at the next step's border.
"""

import os
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from e5core import checkpoint
from e5core.adapter import write_adapter
from e5core.config import read_json
from e5core.distributed import World, share
from e5core.encoder import EmbeddingModel
from e5core.lora import LoraConfig
from e5core.optim import AdamW
from e5core.sharding import Slice
from e5core.stretches import write_stretches

PARTS_LIMIT_S = 600.0  # from the beginning of a save until the last rank's part is there
FAREWELL_S = 5.0  # the same, when the run ends by an error and the parts may still come
_LIST = ".part_{}.json"  # what a rank wrote; its last file


@dataclass(frozen=True, kw_only=True, slots=True)
class _Snapshot:
    """A step's state in host memory; adapter and golden vectors are rank 0's."""

    step: int
    parts: dict[str, dict[str, Slice]]  # of each kind, what this rank writes
    adapter: dict[str, Tensor]
    golden: np.ndarray
    state: dict[str, Any]
    lora: LoraConfig | None
    card: checkpoint.Card


class Saving:
    """The checkpoints of a run, written one at a time by a thread; a context, whose end waits for the thread."""

    def __init__(self, run: Path, keep: int, world: World, newest: int) -> None:
        """keep: newest checkpoints to leave, beside the best.  newest: the step that is saved already, 0 for none."""
        self._run, self._keep, self._world = run, keep, world
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="saving")
        self._in_flight: list[Future[None]] = []  # this rank's part; on rank 0 the whole, too
        self._step = newest  # saved, or in flight
        self._deadline = 0.0

    def begin(
        self,
        step: int,
        model: EmbeddingModel,
        lora: LoraConfig | None,
        card: checkpoint.Card,
        golden: np.ndarray,
        optimizer: AdamW,
        state: Mapping[str, Any],
    ) -> None:
        """Copy the state to host memory and begin to write RUN/step_N, after the save before has ended.

        step: of one that is saved already only the record of the best is written.  lora: None where all weights are
        trained.  state: what state.json holds beside the number of updates.
        Raises OSError as `check` does.
        """
        if step == self._step:
            if self._world.is_main and state["best"] is not None:
                checkpoint.write_json(self._run / "best.json", state["best"])
            return
        self.finish()
        world = self._world
        same = world if model.shards is None else model.shards.replicas  # the ranks that hold what this one holds
        held = {"optimizer": optimizer.state(), **({"weights": model.slices()} if model.full else {})}
        parts = {kind: _shares_on_host(slices, same) for kind, slices in held.items()}
        masters = {} if model.full else dict(model.masters())
        adapter = {name: _on_host(tensor) for name, tensor in masters.items()} if world.is_main else {}
        if world.device.type == "cuda":
            torch.cuda.current_stream(world.device).synchronize()  # the copies are done
        state = {**state, "n_updates": optimizer.n_updates}
        snapshot = _Snapshot(step=step, parts=parts, adapter=adapter, golden=golden, state=state, lora=lora, card=card)
        self._step, self._deadline = step, time.monotonic() + PARTS_LIMIT_S
        part = self._thread.submit(self._write_part, snapshot)
        whole = [self._thread.submit(self._make_whole, snapshot, part)] if world.is_main else []
        self._in_flight = [part, *whole]

    def check(self) -> None:
        """Say on every rank what could not be saved on any, at a border that all ranks pass.  Raises OSError."""
        if self._in_flight:
            done = [future for future in self._in_flight if future.done()]
            self._agree(done)
            ended = share(len(done) == len(self._in_flight), self._world)
            self._in_flight = [] if all(ended) else self._in_flight

    def finish(self) -> None:
        """Wait on every rank until the save in flight, if any, is whole.  Raises OSError as `check` does."""
        if self._in_flight:
            self._agree(self._in_flight[:1])
            self._agree(self._in_flight[1:])
            self._in_flight = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._deadline = min(self._deadline, time.monotonic() + FAREWELL_S)
        self._thread.shutdown()
        if self._world.is_main:
            shutil.rmtree(self._partial(), ignore_errors=True)

    def _agree(self, futures: list[Future[None]]) -> None:
        failed = None
        for future in futures:
            try:
                future.result()
            except (OSError, SafetensorError) as error:
                failed = failed or str(error)
        for rank, fault in enumerate(share(failed, self._world)):
            if fault is not None:
                self._deadline = 0.0  # parts are missing for good
                raise OSError(
                    f"could not save {checkpoint.step_folder(self._run, self._step)} on rank {rank}: {fault}; earlier "
                    f"checkpoints in {self._run} are whole: make room and go on with train.resume=true"
                )

    def _partial(self) -> Path:
        return self._run / f"{checkpoint.PARTIAL}{self._step}"

    def _write_part(self, snapshot: _Snapshot) -> None:
        """Write this rank's files, and last the list of them."""
        folder, world = self._partial(), self._world
        folder.mkdir(exist_ok=True)
        suffix = f"{world.rank:05d}_of_{world.world_size:05d}.safetensors"
        files = [write_stretches(folder / f"{kind}_{suffix}", slices) for kind, slices in snapshot.parts.items()]
        if world.is_main:
            if snapshot.lora is not None:
                write_adapter(folder, snapshot.adapter, snapshot.lora, snapshot.card.base_path)
                files += [folder / name for name in checkpoint.ADAPTER_FILES]
            checkpoint.write_json(folder / "e5core.json", asdict(snapshot.card))
            np.save(folder / "golden.npy", snapshot.golden, allow_pickle=False)
            checkpoint.write_json(folder / "state.json", snapshot.state)
            files += [folder / name for name in (*checkpoint.CARD_FILES, "state.json")]
        checkpoint.write_json(folder / _LIST.format(world.rank), checkpoint.describe_files(files))

    def _make_whole(self, snapshot: _Snapshot, part: Future[None]) -> None:
        """Put the lists of all ranks into the manifest, then let the folder count and delete what is old."""
        part.result()
        folder, files = self._partial(), {}
        for rank in range(self._world.world_size):
            path = folder / _LIST.format(rank)
            self._wait_for(path, rank)
            files |= read_json(path)
            path.unlink()
        checkpoint.write_manifest(folder, snapshot.step, self._world.world_size, files)
        checkpoint.flush(folder)
        os.rename(folder, checkpoint.step_folder(self._run, snapshot.step))
        checkpoint.flush(self._run)
        if snapshot.state["best"] is not None:
            checkpoint.write_json(self._run / "best.json", snapshot.state["best"])
        checkpoint.prune(self._run, self._keep)

    def _wait_for(self, path: Path, rank: int) -> None:
        while not path.is_file():
            if time.monotonic() > self._deadline:
                raise TimeoutError(f"the part of rank {rank} has not come to {path.parent}, a folder of all ranks")
            time.sleep(0.01)


def _shares_on_host(slices: Mapping[str, Slice], same: World) -> dict[str, Slice]:
    """Begin to copy what this rank writes of slices that all ranks of `same` hold."""
    own = {name: part.share(same.rank, same.world_size) for name, part in slices.items()}
    return {name: Slice(_on_host(part.values), part.start, part.shape) for name, part in own.items()}


def _on_host(tensor: Tensor) -> Tensor:
    """Begin to copy a tensor to host memory that the device can write to by itself."""
    if tensor.device.type != "cuda":
        return tensor.detach().clone()
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor.detach(), non_blocking=True)
