"""Texts to vectors: `python -m e5core.encode MODEL --input TEXTS.jsonl --output V.npy`, and Encoder for Python.

Under torchrun (`torchrun --nproc-per-node N -m e5core.encode ...`) each rank embeds a share of the texts.

MODEL is a run folder, a checkpoint folder RUN/step_N, an adapter that PEFT made, a Hugging Face folder or a .gguf file.
`--selfcheck` embeds ten fixed texts and holds them against the vectors that training stored, so that a changed library,
file or machine shows before a million texts are encoded.
"""

import argparse
import hashlib
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import get_args

import numpy as np

from e5core.distributed import finish, log, log_error, share, start
from e5core.encoder import Dtype
from e5core.metrics import TextProgress
from e5core.records import read_texts
from e5core.rope_scaling import AS_TRAINED, LongContext, add_options, chosen_context
from e5core.sharding import Strategy
from e5core.text_encoder import Encoder, describe_device
from e5core.trained import identity
from e5core.vector_shards import Form, VectorFile


def encode_file(
    encoder: Encoder, source: Path, output: Path, task: str | None, form: Form = "float32", model: str = ""
) -> int:
    """Encode a file of texts into a .npy of (n, dim), in memory that does not grow with n.  Returns n.

    Rank 0 writes it; all ranks read the texts. A call that is cut off leaves its whole shards, and the same call goes
    on behind them; on as many ranks as before, with the same bytes.
    form: of the numbers in the file (vector_shards.py).  model: what names the weights, by hash.
    Raises ValueError where what was cut off was of other texts, another model or other settings.
    """
    n_texts, digest = 0, hashlib.blake2b(digest_size=16)
    for text in read_texts(source):
        n_texts += 1
        digest.update(text.encode() + b"\n\0")
    if n_texts == 0:
        raise ValueError(f"{source}: no text in it")
    world = encoder.world
    if not world.is_main:
        for _ in _vectors(encoder, source, task, share(0, world)[0], None):
            pass
        return n_texts
    made_of = {"texts": digest.hexdigest(), "model": model, "dtype": str(encoder.dtype), "task": task}
    made_of["fp8_skip"] = None if encoder.model.fp8_skip is None else list(encoder.model.fp8_skip)
    sizes = repr(encoder.model.backbone.config)  # and positions, which a LongContext changes
    made_of |= {
        "max_tokens": encoder.max_tokens,
        "backbone": hashlib.blake2b(sizes.encode(), digest_size=16).hexdigest(),
    }
    with VectorFile(output, (n_texts, encoder.dim), form, made_of) as file:
        first = share(file.n_done, world)[0]
        if first:
            log(f"going on with {output} behind {first:,} of {n_texts:,} vectors")
        if first < n_texts:
            with TextProgress(n_texts - first) as progress:
                for vectors in _vectors(encoder, source, task, first, progress):
                    file.append(vectors)
        file.finish()
    return n_texts


def _vectors(
    encoder: Encoder, source: Path, task: str | None, first: int, progress: TextProgress | None
) -> Iterator[np.ndarray]:
    texts = islice(read_texts(source), first, None)
    while piece := list(islice(texts, encoder.chunk)):
        yield encoder.encode(piece, task, progress=progress)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.  Returns the exit status: 0, 1 for a failed selfcheck, 2 for bad input."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if (arguments.input is None) != (arguments.output is None) or not (arguments.selfcheck or arguments.input):
        parser.error("--input and --output are needed together (or --selfcheck alone)")
    context = chosen_context(arguments)
    if arguments.selfcheck and (arguments.max_tokens, arguments.dimensions, context) != (None, None, AS_TRAINED):
        parser.error("--selfcheck takes the run's own length and positions, so no option for these goes with it")
    if arguments.output is not None and not arguments.output.parent.is_dir():
        parser.error(f"--output: no folder {arguments.output.parent}")
    try:
        passed = _run(arguments, context)
    except (ValueError, OSError, FloatingPointError) as error:
        log_error(f"e5core.encode: {error}")
        return 2
    finish()
    return 0 if passed else 1


def _run(arguments: argparse.Namespace, context: LongContext) -> bool:
    """Do what the command line asks for.  Returns whether the selfcheck passed, True without one."""
    world = start()
    log(describe_device(world.device))
    chosen = {name: vars(arguments)[name] for name in ("max_tokens", "dtype", "base", "dimensions", "strategy")}
    encoder = Encoder.load(arguments.model, world=world, context=context, **chosen)
    log(encoder.tokenizer.describe())
    if arguments.selfcheck and not _selfcheck(encoder):
        return False
    if arguments.input is not None:
        model = identity(arguments.model, arguments.base) if world.is_main else ""
        given = (arguments.input, arguments.output, arguments.task, arguments.vectors, model)
        n_texts = encode_file(encoder, *given)
        log(f"wrote {arguments.output}: {n_texts:,} vectors; {encoder.n_truncated:,} texts were truncated")
    return True


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m e5core.encode", description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="run folder, adapter folder, Hugging Face folder or .gguf file")
    parser.add_argument("--base", metavar="PATH", help="base model of an adapter (default: where the adapter says)")
    parser.add_argument("--input", type=Path, help='JSON lines with a "text" each')
    parser.add_argument(
        "--output", type=Path, help=".npy file to write, (n, dim), unit rows; goes on where it was cut off"
    )
    parser.add_argument("--vectors", choices=get_args(Form), default="float32", help="int8: scales in .scales.npy")
    parser.add_argument("--strategy", choices=get_args(Strategy), default="auto", help="how ranks hold the model")
    parser.add_argument("--task", help="instruction, for queries (or the run's prefix); documents have none")
    parser.add_argument("--max-tokens", type=int, help="cut texts to this many tokens (default: the run's, else 512)")
    parser.add_argument("--dimensions", type=int, help="keep this many numbers of each vector, of unit length again")
    parser.add_argument("--dtype", choices=get_args(Dtype), default="auto", help="auto: as trained, fp8 too")
    add_options(parser)
    parser.add_argument("--selfcheck", action="store_true", help="compare with the vectors stored by the training run")
    return parser


def _selfcheck(encoder: Encoder) -> bool:
    least, allowed = encoder.selfcheck(), 1 - encoder.golden_tolerance
    passed = least >= allowed
    verdict = "passed" if passed else "FAILED"
    log(f"selfcheck {verdict}: lowest cosine {least:.7f} to the stored vectors, allowed {allowed}")
    return passed


if __name__ == "__main__":
    sys.exit(main())
