"""Take a trained model elsewhere: `python -m e5core.export RUN OUT --format FORMAT`.

    peft                   the adapter for PEFT over transformers' AutoModel (task type FEATURE_EXTRACTION)
    peft-causal-lm         the same over AutoModelForCausalLM
    merged                 a Hugging Face folder with the adapter merged into the weights
    sentence-transformers  that with modules.json: Transformer, last-token Pooling, Normalize, and prompts
    gguf                   one file for llama.cpp, which says that the last token is pooled and EOS appended

Every export is written under a temporary name, loaded again by e5core and, in a process of its own, by the library that
it is for, and embeds texts of one and two tokens, of full length, and longer ones. Token ids must be equal and cosines
to the run at least 0.999999 (fp32) or 0.999 (bf16, and llama.cpp, which rounds inside), or nothing is left in OUT.
The base of an adapter that was trained on a .gguf file is written beside it, dequantised, as OUT/base. What was trained
with train.full has no adapter: it leaves as merged, sentence-transformers or gguf.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from e5core.adapter import adapter_tensors, write_adapter
from e5core.checkpoint import Card, write_json
from e5core.distributed import log, log_error
from e5core.layouts import hf_description
from e5core.lora import LoraConfig
from e5core.model_files import merged, write_gguf, write_hf_weights
from e5core.stretches import Stretches
from e5core.template import PREFIXES, Template, query_text
from e5core.text_encoder import Encoder
from e5core.tokenizer_files import gguf_tokenizer, write_hf_tokenizer
from e5core.trained import check_base, find_card, lora_of, trained_folder, weight_files
from e5core.weights import fingerprint, names_of, read_config, tensors_of

Format = Literal["peft", "peft-causal-lm", "merged", "sentence-transformers", "gguf"]
# The package that loads it, and the script in consumers/ that does.
CONSUMERS: dict[Format, tuple[str, str]] = {
    "peft": ("peft", "with_peft"),
    "peft-causal-lm": ("peft", "with_peft"),
    "merged": ("transformers", "with_transformers"),
    "sentence-transformers": ("sentence_transformers", "with_sentence_transformers"),
    "gguf": ("xllamacpp", "with_llama_cpp"),
}
# Names and instructions as intfloat/e5-mistral-7b-instruct publishes them; query and document are what
# sentence-transformers' encode_query and encode_document look for.
_SEARCH = "Given a web search query, retrieve relevant passages that answer the query"
_INSTRUCTIONS = {
    "query": _SEARCH,
    "document": "",
    "web_search_query": _SEARCH,
    "sts_query": "Retrieve semantically similar text.",
    "bitext_query": "Retrieve parallel sentences.",
    "summarization_query": "Given a news summary, retrieve other semantically similar summaries",
}
_WORDS = "Vaccines train the immune system by showing it a harmless part of a germ, 12.5% of it; "


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """What is exported: the folder of an adapter or of weights, and all that is known of it."""

    folder: Path
    card: Card
    lora: LoraConfig | None  # None: all weights were trained
    adapter: dict[str, Tensor]
    base: Path

    def names(self) -> list[str]:
        """Return our names of the model's tensors, in the order of `tensors`."""
        if self.lora is None:
            return list(Stretches(weight_files(self.folder)).shapes)
        return names_of(self.base, read_config(self.base))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (our name, fp32 tensor) of the trained model, with its adapter merged."""
        if self.lora is None:
            return Stretches(weight_files(self.folder)).whole()
        base = tensors_of(self.base, read_config(self.base))
        return merged(base, self.adapter, self.lora.alpha / self.lora.rank)


@dataclass(frozen=True, kw_only=True, slots=True)
class Samples:
    """Formatted texts, their token ids and embeddings, (n, dim) float32, by the run itself in fp32."""

    texts: list[str]
    ids: list[list[int]]
    vectors: np.ndarray


def export(
    model: str, out: Path, form: Format, dtype: torch.dtype = torch.float32, base: str | None = None
) -> dict[str, float]:
    """Export a run or an adapter to `out`, which must not exist.

    dtype: of merged weights, float32 or bfloat16; adapters are fp32.  base: where the base model lies, None: where the
    adapter says.  Returns the lowest cosine by everyone who loaded the export: "e5core", and its library's name.
    Raises ValueError or OSError for what cannot be exported, RuntimeError where the export is not the same model; then
    nothing is left behind.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists; choose another name, or move it away")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"no folder {out.absolute().parent} to write {out.name} in")
    if (out.suffix == ".gguf") != (form == "gguf"):
        raise ValueError(f"{out}: the format gguf is a file named *.gguf, the others are folders named otherwise")
    trained = _read(model, base)
    if trained.lora is None and form in ("peft", "peft-causal-lm"):
        raise ValueError(
            f"{trained.folder}: all weights were trained (train.full), so there is no adapter to export as {form}; "
            "take merged, sentence-transformers or gguf"
        )
    with tempfile.TemporaryDirectory(prefix=".partial_", dir=out.absolute().parent) as room:
        partial = Path(room) / out.name
        encoder = Encoder.load(str(trained.folder), dtype="float32", base=str(trained.base))
        samples = sample(encoder)
        _write(partial, out, form, dtype, trained, encoder)
        del encoder  # the next models need its memory
        cosines = _verify(partial, form, dtype, trained, samples)
        os.rename(partial, out)
    return cosines


def sample(encoder: Encoder) -> Samples:
    """Embed texts of one token, of two, some, as many as there may be, and too many, with and without a task."""
    long = _WORDS * (8 * encoder.max_tokens // len(_WORDS.split()) + 1)
    room = encoder.max_tokens - 1 - (encoder.tokenizer.bos_id is not None)

    def n_tokens(n_characters: int) -> int:
        ids, n_cut = encoder.tokenizer.encode_batch([long[:n_characters].strip()], encoder.max_tokens)
        return room + n_cut if n_cut else len(ids[0]) - (encoder.max_tokens - room)

    counts = [bisect_right(range(len(long)), size, key=n_tokens) - 1 for size in (1, 2, room)]
    texts = [long[:n].strip() for n in counts] + [long.strip(), "Die Straßenbahn fährt alle zehn Minuten."]
    texts += [prompts(encoder.template)["query"] + text for text in (texts[2], "猫が窓辺で眠っている。")]
    ids, _ = encoder.tokenizer.encode_batch(texts, encoder.max_tokens)
    return Samples(texts=texts, ids=ids, vectors=encoder.encode(texts))


def prompts(template: Template) -> dict[str, str]:
    """Return what sentence-transformers puts before texts, by its names of prompts."""
    if template == "instruct":
        return {name: query_text(task, "") for name, task in _INSTRUCTIONS.items()}
    words = PREFIXES if template == "prefix" else ()
    return {"query": "", "document": ""} | {word: query_text(word, "", template) for word in words}


def _read(model: str, base: str | None) -> Trained:
    folder = trained_folder(Path(model))
    if folder is None:
        raise ValueError(f"{model}: no run and no adapter folder, so there is nothing trained in it to export")
    card = find_card(folder, base)
    adapter = {} if card.lora is None else dict(adapter_tensors(folder))
    still = [name for name, tensor in adapter.items() if name.endswith("lora_b") and not tensor.any()]
    if still or (not adapter and card.lora is not None):
        raise ValueError(
            f"{folder}: lora_b of {len(still)} linears is all zero, so nothing was learnt there, first of them "
            f"{still[:1]}; an adapter like that changes nothing and is not exported"
        )
    if not card.causal:
        raise ValueError(
            f"{folder}: trained with backbone.causal = false, which the other libraries have no word for; use e5core"
        )
    if card.pooling != "last":
        raise ValueError(
            f"{folder}: trained with backbone.pooling = {card.pooling!r}, and exports pool the last token; use e5core"
        )
    return Trained(folder=folder, card=card, lora=lora_of(card), adapter=adapter, base=check_base(folder, card))


def _write(partial: Path, out: Path, form: Format, dtype: torch.dtype, trained: Trained, encoder: Encoder) -> None:
    """Write an export to `partial`, which will be renamed to `out`."""
    config = read_config(trained.base)
    if form == "gguf":
        tokenizer = gguf_tokenizer(encoder.tokenizer, trained.base, config.vocab_size)
        write_gguf(partial, config, tokenizer, trained.names(), trained.tensors(), dtype)
        return
    partial.mkdir()
    write_hf_tokenizer(partial, encoder.tokenizer, trained.base, encoder.max_tokens)
    if form in ("peft", "peft-causal-lm"):
        _write_peft(partial, out, form, trained, encoder)
        return
    _write_hf(partial, trained.base, encoder, trained.tensors(), dtype)
    if form == "sentence-transformers":
        _write_sentence_transformers(partial, encoder)


def _write_peft(partial: Path, out: Path, form: Format, trained: Trained, encoder: Encoder) -> None:
    card, base = trained.card, trained.base.absolute()
    if trained.base.suffix == ".gguf":
        (partial / "base").mkdir()
        config = read_config(trained.base)
        _write_hf(partial / "base", trained.base, encoder, tensors_of(trained.base, config), torch.float32)
        write_hf_tokenizer(partial / "base", encoder.tokenizer, trained.base, encoder.max_tokens)
        base = out.absolute() / "base"
        card = replace(card, base_sha256=fingerprint(partial / "base"))
    write_adapter(partial, trained.adapter, trained.lora, str(base), head=form == "peft-causal-lm")
    write_json(partial / "e5core.json", asdict(replace(card, base_path=str(base))))
    if (trained.folder / "golden.npy").is_file():
        shutil.copyfile(trained.folder / "golden.npy", partial / "golden.npy")


def _write_hf(
    folder: Path, base: Path, encoder: Encoder, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype
) -> None:
    config, tokenizer = read_config(base), encoder.tokenizer
    ids = {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.eos_id}
    ids |= {} if tokenizer.bos_id is None else {"bos_token_id": tokenizer.bos_id}
    write_json(folder / "config.json", hf_description(base, config, str(dtype).removeprefix("torch.")) | ids)
    write_hf_weights(folder, config, tensors, dtype)


def _write_sentence_transformers(folder: Path, encoder: Encoder) -> None:
    names = ("", "1_Pooling", "2_Normalize")
    kinds = ("Transformer", "Pooling", "Normalize")
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(zip(names, kinds, strict=True))
    ]
    (folder / "modules.json").write_text(json.dumps(modules, indent=2) + "\n", encoding="utf-8")
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": encoder.max_tokens, "do_lower_case": False})
    write_json(folder / "config_sentence_transformers.json", {
        "prompts": prompts(encoder.template), "default_prompt_name": None, "similarity_fn_name": "cosine",
    })  # fmt: skip
    (folder / "1_Pooling").mkdir()
    (folder / "2_Normalize").mkdir()
    write_json(folder / "1_Pooling" / "config.json", {
        "word_embedding_dimension": encoder.model.backbone.config.dim,
        "pooling_mode_cls_token": False,
        "pooling_mode_mean_tokens": False,
        "pooling_mode_lasttoken": True,
        "include_prompt": True,
    })  # fmt: skip


def _verify(partial: Path, form: Format, dtype: torch.dtype, trained: Trained, samples: Samples) -> dict[str, float]:
    """Load the export by ourselves and by its library.  Returns the lowest cosine of each.  Raises RuntimeError."""
    is_adapter = form in ("peft", "peft-causal-lm")
    base = partial / "base" if (partial / "base").is_dir() else trained.base
    exact = dtype == torch.float32 or is_adapter
    length = trained.card.max_tokens
    own = Encoder.load(str(partial), dtype="float32", max_tokens=length, base=str(base) if is_adapter else None)
    ids, _ = own.tokenizer.encode_batch(samples.texts, length)
    cosines = {"e5core": _compare("e5core", samples, ids, own.encode(samples.texts), 0.999999 if exact else 0.999)}
    del own
    package, script = CONSUMERS[form]
    if find_spec(package) is None:
        log(f"not verified by {package}, which is not installed here; verified by e5core alone")
        return cosines
    answer = _ask(script, partial, {
        "max_tokens": length, "base": str(base), "texts": samples.texts, "ids": samples.ids,
    })  # fmt: skip
    least = 0.999999 if exact and form != "gguf" else 0.999
    cosines[package] = _compare(package, samples, answer["ids"], np.array(answer["vectors"]), least)
    return cosines


def _ask(script: str, partial: Path, request: dict) -> dict:
    """Run a consumer in a process of its own.  Returns its answer."""
    with tempfile.TemporaryDirectory() as room:
        asked, answer = Path(room, "request.json"), Path(room, "answer.json")
        asked.write_text(json.dumps(request), encoding="utf-8")
        program = Path(__file__).with_name("consumers") / f"{script}.py"
        command = [sys.executable, str(program), str(partial), str(asked), str(answer)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode:
            told = "; ".join(done.stderr.strip().splitlines()[-3:])
            raise RuntimeError(f"{script.replace('_', ' ')} the export cannot be used (exit {done.returncode}): {told}")
        return json.loads(answer.read_text(encoding="utf-8"))


def _compare(who: str, samples: Samples, ids: list[list[int]], vectors: np.ndarray, least: float) -> float:
    for text, ours, theirs in zip(samples.texts, samples.ids, ids, strict=True):
        if ours != theirs:
            raise RuntimeError(
                f"by {who} the export has other token ids: {theirs[:5]} ... {theirs[-3:]} ({len(theirs)}) instead of "
                f"{ours[:5]} ... {ours[-3:]} ({len(ours)}) for {text[:60]!r}"
            )
    one, other = samples.vectors.astype(np.float64), np.asarray(vectors, dtype=np.float64)
    cosines = (one * other).sum(axis=1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)
    lowest = float(cosines.min())
    if not lowest >= least:  # NaN as well
        raise RuntimeError(f"by {who} the export embeds otherwise: lowest cosine {lowest:.7f}, allowed {least}")
    log(f"verified by {who}: token ids equal, lowest cosine {lowest:.7f} over {len(ids)} texts, allowed {least}")
    return lowest


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.  Returns the exit status: 0, 1 for an export that failed its check, 2 for bad input."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m e5core.export", description=__doc__, formatter_class=formatter)
    parser.add_argument("run", metavar="RUN", help="run folder or adapter folder")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write (for gguf a *.gguf file); may not exist")
    parser.add_argument("--format", required=True, choices=get_args(Format))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of merged weights")
    parser.add_argument("--base", metavar="PATH", help="base model (default: where the adapter says)")
    arguments = parser.parse_args(argv)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[arguments.dtype]
    try:
        export(arguments.run, arguments.out, arguments.format, dtype, arguments.base)
    except RuntimeError as error:
        log_error(f"e5core.export: {error}; nothing was written")
        return 1
    except (ValueError, OSError) as error:
        log_error(f"e5core.export: {error}")
        return 2
    log(f"wrote {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
