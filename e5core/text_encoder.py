"""Encoder: a model, its tokenizer and its template; texts in, unit vectors out.

What a path means is settled here: a run folder (its best checkpoint where training kept one, else the newest), a
checkpoint folder RUN/step_N, an adapter that PEFT made, a Hugging Face folder or a .gguf file (an untrained model).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch

import e5kernels.attention
import e5kernels.dropout
import e5kernels.fp8
import e5kernels.infonce
import e5kernels.last_token
import e5kernels.lora_linear
import e5kernels.rms_norm
import e5kernels.rope
import e5kernels.swiglu
from e5core.adapter import read_adapter
from e5core.batches import CHARACTERS, deal, pack
from e5core.checkpoint import check_files
from e5core.distributed import ALONE, World, alone, gather_rows, largest, sum_over_ranks
from e5core.encoder import Dtype, EmbeddingModel, build_model, settle_dtype, unit_prefix
from e5core.metrics import TextProgress
from e5core.preemption import NEVER
from e5core.rope_scaling import AS_TRAINED, LongContext
from e5core.sharding import Strategy
from e5core.stretches import Stretches
from e5core.template import Template, check_task, document_text, evaluation_task, query_text, template_of
from e5core.tokenizer import Tokenizer, TokenizerConfig
from e5core.trained import DEFAULT_MAX_TOKENS, check_base, find_card, lora_of, trained_folder, weight_files
from e5core.weights import resolve_model

OPS = (
    e5kernels.attention,
    e5kernels.dropout,
    e5kernels.fp8,
    e5kernels.infonce,
    e5kernels.last_token,
    e5kernels.lora_linear,
    e5kernels.rms_norm,
    e5kernels.rope,
    e5kernels.swiglu,
)
CHUNK = 2048  # texts that a rank tokenises and packs together
# Short, long, empty and non-Latin texts; a pair is (task, text).
GOLDEN_TEXTS: tuple[tuple[str | None, str], ...] = (
    (None, ""),
    (None, "a"),
    (None, "The quick brown fox jumps over the lazy dog."),
    ("Retrieve semantically similar text.", "A man is playing a guitar."),
    ("Given a web search query, retrieve relevant passages that answer the query", "how do vaccines work"),
    (None, "Vaccines train the immune system by showing it a harmless part of a germ. " * 8),
    (None, "Die Straßenbahn fährt alle zehn Minuten."),
    (None, "猫が窓辺で眠っている。"),
    (None, "def add(a, b):\n    return a + b\n"),
    ("Retrieve parallel sentences.", "Быстрая лиса перепрыгнула через забор 🦊"),
)


class Encoder:
    """A model, its tokenizer and its template: texts in, unit vectors out.

    Over several ranks each embeds a share of the texts and gets all vectors, the same ones everywhere.
    """

    def __init__(
        self,
        model: EmbeddingModel,
        tokenizer: Tokenizer,
        device: torch.device,
        max_tokens: int,
        world: World = ALONE,
        dimensions: int | None = None,
        template: Template = "instruct",
    ) -> None:
        """world: whose ranks all hold this model, and call every method together, with the same texts.

        dimensions: how many numbers of an embedding are kept (unit_prefix); None: all.
        template: of queries, that of training.
        """
        config = model.backbone.config
        if dimensions is not None and not 1 <= dimensions <= config.dim:
            raise ValueError(f"dimensions must be in 1..{config.dim}, the model's own: got {dimensions}")
        if tokenizer.vocab_size > config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} ids, the model embeds {config.vocab_size}; not of one model"
            )
        if max_tokens > config.max_positions:
            raise ValueError(f"max_tokens is {max_tokens}, the model was made for at most {config.max_positions}")
        self.model, self.tokenizer, self.device, self.world = model, tokenizer, device, world
        self.max_tokens, self.template = max_tokens, template
        self.dim = config.dim if dimensions is None else dimensions
        self.chunk = CHUNK * world.world_size  # texts that go through all ranks together
        # Encoding XQuAD's documents with SmolLM2 on 2 AVX2 cores: 534 tokens/s at 1,024, 490 at 4,096 (caches).
        self.batch_tokens = 1024 if device.type == "cpu" else 16384
        # Elsewhere attention goes text by text, and keys that are not the queries' own would cost a mask for each.
        self.share_prefix = config.shares_beginnings and model.pooling == "last" and device.type == "cpu"
        self.n_truncated = 0  # texts cut to max_tokens so far
        self.preemption = NEVER  # by which training leaves an evaluation
        self.golden: np.ndarray | None = None  # vectors of GOLDEN_TEXTS stored with the model
        self.golden_tolerance = 0.0  # what a cosine to them may lack of 1

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.model.parameters()).dtype

    @classmethod
    def load(
        cls,
        model: str,
        *,
        max_tokens: int | None = None,
        dtype: Dtype = "auto",
        world: World | None = None,
        strategy: Strategy = "auto",
        base: str | None = None,
        dimensions: int | None = None,
        context: LongContext = AS_TRAINED,
    ) -> "Encoder":
        """Load a run folder, a checkpoint or another adapter, a Hugging Face folder or a .gguf file.

        max_tokens, dtype: None and "auto" mean what the run was trained with, fp8 included; else 512, and the faster of
        two. A dtype by its name is that of all weights: so a device without fp8 can encode by a run that trained in it.
        world: the ranks that encode together (distributed.start()); None: this process encodes by itself.
        strategy: how the model is sharded over them (sharding.py).
        base: where an adapter's base model lies; None: where the adapter says.
        dimensions: how many numbers of an embedding are kept, the first ones, of unit length again; None: all.
        context: positions for longer texts than the model was trained on (rope_scaling.py).
        Raises FileNotFoundError or ValueError that says what is missing or does not fit.
        """
        folder = trained_folder(Path(model))
        world = alone() if world is None else world
        device = world.device
        if folder is None:
            path = resolve_model(model)
            chosen, _ = settle_dtype(dtype, world)
            held = {"strategy": strategy, "world": world, "context": context}
            built = build_model(path, chosen, device, causal=True, lora=None, seed=0, **held)
            default = min(DEFAULT_MAX_TOKENS, built.backbone.config.max_positions)
            length = default if max_tokens is None else max_tokens
            return cls(built, Tokenizer.load(path), device, length, world, dimensions)
        check_files(folder)
        card = find_card(folder, base)
        path = check_base(folder, card)
        tokenizer = Tokenizer.load(path, TokenizerConfig(**card.tokenizer))
        tokenizer.check_contract(card.tokenizer_contract)
        chosen, _ = settle_dtype(cast(Dtype, card.dtype) if dtype == "auto" else dtype, world)
        length = card.max_tokens if max_tokens is None else max_tokens
        held = {"strategy": strategy, "world": world, "context": context}
        form = {"causal": card.causal, "pooling": card.pooling, "lora": lora_of(card), "seed": 0}
        if card.frozen_dtype == "fp8" and dtype == "auto":
            form["fp8_skip"] = card.fp8_skip
        weights = Stretches(weight_files(folder)).whole() if card.lora is None else None
        built = build_model(path, chosen, device, tensors=weights, **form, **held)
        if card.lora is not None:
            read_adapter(folder, built.backbone, built.put)
        encoder = cls(built, tokenizer, device, length, world, dimensions, template_of(card.template))
        is_whole = "fp8_skip" in form or card.frozen_dtype == "same"
        if (folder / "golden.npy").is_file() and dimensions is None and context == AS_TRAINED and is_whole:
            encoder.golden = np.load(folder / "golden.npy", allow_pickle=False)
        encoder.golden_tolerance = 1e-3 if "bfloat16" in (card.dtype, str(chosen).removeprefix("torch.")) else 1e-5
        if built.fp8_skip is not None:
            encoder.golden_tolerance = 1e-2  # the least rounding of an input moves some codes by a step, 2^-4 of them
        return encoder

    def at_length(self, max_tokens: int) -> "Encoder":
        """Return an encoder by the same model of texts of at most so many tokens.  Raises ValueError as __init__."""
        return Encoder(self.model, self.tokenizer, self.device, max_tokens, self.world, self.dim)

    def encode(
        self,
        texts: Sequence[str],
        task: str | None = None,
        normalize: bool = True,
        progress: TextProgress | None = None,
    ) -> np.ndarray:
        """Embed texts.

        task: the instruction of queries (and of both sides in symmetric tasks), or the prefix, for a model that was
        trained with these; None for documents.
        progress: told of every micro-batch's texts and their tokens, a shared prefix in each, as it is queued (other
        ranks' when their vectors come); None shows nothing.
        Returns (n, dim) float32 in the order of the texts, unit rows unless `normalize` is false.
        Raises FloatingPointError where an embedding is not finite, ValueError for a task that its template has not,
        Preempted where `preemption` says to leave.
        """
        check_task(task, self.template)
        vectors = np.empty((len(texts), self.dim), dtype=np.float32)
        for first in range(0, len(texts), self.chunk):
            piece = texts[first : first + self.chunk]
            formatted = [query_text(task, text, self.template) if task else document_text(text) for text in piece]
            vectors[first : first + self.chunk] = self._encode_chunk(formatted, normalize, progress)
        broken = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if len(broken):
            raise FloatingPointError(f"the embedding of text {broken[0]} is not finite ({texts[broken[0]][:80]!r})")
        return vectors

    @torch.inference_mode()
    def _encode_chunk(self, formatted: list[str], normalize: bool, progress: TextProgress | None) -> np.ndarray:
        """Embed this rank's share of formatted texts.  Returns the vectors of all, (n, dim) float32."""
        shares = deal([min(len(text), CHARACTERS * self.max_tokens) for text in formatted], self.world.world_size)
        own = shares[self.world.rank]
        sequences, n_truncated = self.tokenizer.encode_batch([formatted[i] for i in own], self.max_tokens)
        lengths = list(map(len, sequences))
        counts = torch.tensor([sum(lengths), n_truncated], device=self.device)
        n_tokens, n_truncated = sum_over_ranks(counts, self.world).tolist()
        self.n_truncated += n_truncated
        if progress is not None:
            progress.expect(len(formatted), n_tokens)
        vectors = torch.empty(len(own), self.dim, device=self.device)
        packed, shards = pack(sequences, self.batch_tokens, self.device, self.share_prefix), self.model.shards
        rows = [batch.rows.tolist() for batch in packed]  # read now: later the host would wait for all that is queued
        idle = [] if shards is None else [(None, [])] * (largest(len(packed), self.world) - len(packed))
        until_asked = self.preemption.between if shards is None else self.preemption.together
        with self.preemption.phase():
            for batch, own_rows in until_asked([*zip(packed, rows, strict=True), *idle]):
                if batch is None:
                    shards.idle(backward=False)
                    continue
                found = self.model(batch, normalize=normalize)
                vectors[batch.rows] = (unit_prefix(found, self.dim) if normalize else found[:, : self.dim]).float()
                if progress is not None:
                    progress.advance(len(own_rows), sum(lengths[row] for row in own_rows))
        if shards is not None:
            shards.release()
        vectors = gather_rows(vectors, shares, self.world)
        if progress is not None and len(own) < len(formatted):
            progress.advance(len(formatted) - len(own), n_tokens - sum(lengths))
        return vectors.cpu().numpy()

    def golden_vectors(self) -> np.ndarray:
        """Embed GOLDEN_TEXTS, with the template's own tasks.  Returns (10, dim) float32."""
        told = [(evaluation_task("retrieval", task or "", self.template), text) for task, text in GOLDEN_TEXTS]
        return np.concatenate([self.encode([text], task or None) for task, text in told])

    def selfcheck(self) -> float:
        """Embed GOLDEN_TEXTS again.  Returns the lowest cosine to the stored vectors.

        Raises ValueError for a model without stored vectors.
        """
        if self.golden is None:
            raise ValueError("this model has no golden vectors; only what e5core trained can be checked, as it was")
        return float((self.golden_vectors() * self.golden).sum(axis=1).min())


class ShownEncoder:
    """An encoder for people who wait: every call shows its progress on stderr, on rank 0."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    def encode(self, texts: Sequence[str], task: str | None = None, normalize: bool = True) -> np.ndarray:
        """Embed texts as Encoder.encode does.  Raises ValueError where there is none."""
        if not self.encoder.world.is_main:
            return self.encoder.encode(texts, task, normalize)
        with TextProgress(len(texts)) as progress:
            return self.encoder.encode(texts, task, normalize, progress)


def describe_device(device: torch.device) -> str:
    """Return the first log line: device, torch, and the face that each op runs by."""
    ops: dict[str, list[str]] = {}
    for room in OPS:
        ops.setdefault(room.face(device), []).append(room.__name__.rpartition(".")[2])
    faces = "; ".join(f"{face}: {', '.join(names)}" for face, names in ops.items())
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    return f"device {named}; torch {torch.__version__}; {faces}"
