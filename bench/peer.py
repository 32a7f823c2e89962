"""The other side of bench/train_step.py: transformers + PEFT at their best, one contender a process.

A contender is a precision and a way to forward the texts. All of them see the token ids of our GlobalBatch, add LoRA of
our rank to the same seven linears, take the last token's state, our InfoNCE, clip and update. What makes them fast is
taken where it is exact: no key-value cache; the texts sorted by length, right-padded to the longest of each forward;
and no attention mask, since a causal model's real tokens never see the padding to their right (sdpa then needs no mask
tensor and shares key heads without copying them).

Started by bench.train_step --peer; prints one JSON object.
"""

import argparse
import json
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModel, GgufConfig, PreTrainedModel

from bench.contest import limit_memory, timed_turn
from bench.padded import LINEARS, embed, grouped, n_positions
from bench.roofline import chosen_device
from bench.train_step import Precision, add_options, real_batch
from e5core.loss import LossConfig, infonce_loss
from e5core.optim import OptimConfig
from e5core.weights import resolve_model


def main() -> None:
    """Write the model as a Hugging Face folder (--save), or take one contender's turn."""
    arguments = _parser().parse_args()
    if arguments.save is not None:
        load_base(resolve_model(arguments.model), torch.float32).save_pretrained(arguments.save)
        print(json.dumps({"saved": str(arguments.save)}))
        return
    device = chosen_device(arguments.device)
    limit_memory(arguments.memory_gib)
    batch = real_batch(arguments)
    model = adapted(arguments.folder, Precision(arguments.precision), arguments.dropout, device)
    if arguments.recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    groups = grouped(batch, arguments.forward)
    optim, autocast = OptimConfig(), arguments.precision == Precision.AUTOCAST
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=optim.lr, weight_decay=optim.weight_decay, fused=True)

    def step() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            embeddings = embed(model, batch.sequences, groups, device)
        loss = infonce_loss(embeddings, batch, LossConfig()).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, optim.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    turn = timed_turn(step, device, arguments.runs)
    print(json.dumps(turn | {"tokens": batch.n_tokens, "positions": n_positions(batch.sequences, groups)}))


def load_base(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load the decoder of a Hugging Face folder or a .gguf file (dequantised) by transformers, without its head."""
    gguf = {"gguf_file": path.name, "quantization_config": GgufConfig(dequantize=True)} if path.is_file() else {}
    return AutoModel.from_pretrained(path.parent if gguf else path, dtype=dtype, attn_implementation="sdpa", **gguf)


def adapted(folder: Path, precision: Precision, dropout: float, device: torch.device) -> PeftModel:
    """Load the decoder and put PEFT's adapters on it, in training mode.

    PEFT keeps adapters in fp32 beside bf16 weights; Precision.BF16 keeps them in bf16 too, which spares the casts.
    """
    weights = torch.bfloat16 if precision in (Precision.WEIGHTS, Precision.BF16) else torch.float32
    base = load_base(folder, weights).to(device)
    base.config.use_cache = False
    config = LoraConfig(r=16, lora_alpha=32, lora_dropout=dropout, target_modules=LINEARS)
    return get_peft_model(base, config, autocast_adapter_dtype=precision is not Precision.BF16).train()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_options(parser)
    parser.add_argument("--save", type=Path, help="write --model into this folder as Hugging Face files, and stop")
    parser.add_argument("--folder", type=Path, help="Hugging Face folder of the same model")
    parser.add_argument("--precision", choices=list(Precision), default=Precision.FP32)
    parser.add_argument("--forward", default="apart", help="together, apart or sorted-N")
    parser.add_argument("--recompute", action="store_true", help="gradient checkpointing, where memory needs it")
    return parser


if __name__ == "__main__":
    main()
