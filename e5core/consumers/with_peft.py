"""Embed texts with transformers and PEFT: the base model, by AutoModel or by AutoModelForCausalLM, and the adapter."""

import json
import sys
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer


def main(exported: str, request: str, answer: str) -> None:
    """Answer a request (see the package's docstring)."""
    asked = json.loads(Path(request).read_text(encoding="utf-8"))
    has_head = PeftConfig.from_pretrained(exported).task_type == "CAUSAL_LM"
    base = (AutoModelForCausalLM if has_head else AutoModel).from_pretrained(asked["base"], dtype=torch.float32)
    model = PeftModel.from_pretrained(base, exported).eval()
    tokenizer = AutoTokenizer.from_pretrained(exported)
    ids = [tokenizer(text, truncation=True, max_length=asked["max_tokens"])["input_ids"] for text in asked["texts"]]
    vectors = []
    with torch.no_grad():
        for row in ids:
            output = model(input_ids=torch.tensor([row]), output_hidden_states=True)
            vectors.append(output.hidden_states[-1][0, -1].tolist())  # after the final norm
    Path(answer).write_text(json.dumps({"ids": ids, "vectors": vectors}), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
