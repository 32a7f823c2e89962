"""Row-wise fp8 beside the backbone's own dtype: python -m bench.fp8 CONFIG.toml [section.key=value ...].

For the config's model as training begins it (B = 0) and its first batch: cosines in fp8 to without it, of embeddings,
of the gradient of all adapters and of that of the worst linear; and what a step took.
On CUDA first the parts, at the widths of Mistral-7B: a product in fp8 and in bf16, quantisation alone and fused; GB/s
and TFLOP/s by what must be moved and multiplied.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.roofline import device_name, median_seconds, record
from e5core.batches import build_batch, pack
from e5core.config import load_config
from e5core.distributed import alone
from e5core.encoder import build_model, choose_dtype
from e5core.mixture import load_mixture
from e5core.run import Config, check_files
from e5core.step import backward_step
from e5core.tokenizer import Tokenizer
from e5kernels.fp8 import add_rms_norm_rows, quantise_rows, quantise_rows_reference, rows_of, swiglu_rows
from e5kernels.fp8_linear import quantise_weight, scaled_product, scaled_product_reference
from e5kernels.rms_norm import add_rms_norm, rms_norm
from e5kernels.swiglu import swiglu

TOKENS, SHAPES = (8070, 8192), ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096))  # (in, out)


def main() -> None:
    """Measure the parts where there is a GPU, and a model in both forms."""
    arguments = _parser().parse_args()
    device = alone().device
    out = arguments.out or Path(f"bench/results/{device_name(device)}.jsonl")
    if device.type == "cuda":
        for n_tokens in TOKENS:
            for row in [*_products(n_tokens, device, arguments.runs), *_rows(n_tokens, device, arguments.runs)]:
                record({"bench": "fp8", "tokens": n_tokens} | row, device, out)
    config = load_config(Config, arguments.config, arguments.overrides)
    record({"bench": "fp8", "op": "model"} | _cosines(config, device), device, out)


def _products(n_tokens: int, device: torch.device, runs: int) -> list[dict[str, object]]:
    rows = []
    for n_in, n_out in SHAPES:
        x, weight = (torch.randn(n, n_in, device=device, dtype=torch.bfloat16) for n in (n_tokens, n_out))
        quantised, held = rows_of(x), quantise_weight(weight)
        given = (quantised.q, quantised.scale, held.codes, held.scale, None)
        expected = scaled_product_reference(*given, torch.float32)
        error = (scaled_product(*given, torch.bfloat16).float() - expected).abs().max()
        cut = n_in / 32 * 2**-13 / 4 * expected.abs().max()  # tests/test_fp8_linear.py says whose
        assert error <= cut + 2 * (expected.bfloat16().float() - expected).abs().max() + 1e-5, f"off by {error}"
        scales = {"scale_a": quantised.scale, "scale_b": held.scale.T, "out_dtype": torch.bfloat16}
        calls: dict[str, Callable[[], Tensor]] = {
            "fp8": lambda given=given: scaled_product(*given, torch.bfloat16),
            "fp8, no fast accumulation": lambda q=quantised.q, codes=held.codes, scales=scales: torch._scaled_mm(
                q, codes.T, **scales, use_fast_accum=False
            ),
            "bf16": lambda x=x, weight=weight: F.linear(x, weight),
        }
        for name, call in calls.items():
            seconds = median_seconds(call, device, runs)
            row = {"op": "product", "in": n_in, "out": n_out, "dtype": name, "ms": round(1e3 * seconds, 4)}
            rows.append(row | {"tflops": round(2 * n_tokens * n_in * n_out / seconds / 1e12)})
    return rows


def _rows(n_tokens: int, device: torch.device, runs: int) -> list[dict[str, object]]:
    found = []
    for width in (4096, 14336):
        x, up = torch.randn(2, n_tokens, width, device=device).bfloat16()
        weight = torch.ones(width, device=device)
        for got, expected in zip(quantise_rows(x), quantise_rows_reference(x), strict=True):
            assert torch.equal(got.float(), expected.float())
        n = n_tokens * width
        calls: dict[str, tuple[Callable[[], object], int]] = {
            "quantise": (lambda x=x: quantise_rows(x), 3 * n),
            "rms_norm": (lambda x=x, weight=weight: rms_norm(x, weight, 1e-5), 4 * n),
            "rms_norm and quantise": (lambda x=x, weight=weight: add_rms_norm_rows(x, None, weight, 1e-5), 5 * n),
            "add and rms_norm": (lambda x=x, up=up, weight=weight: add_rms_norm(x, up, weight, 1e-5), 8 * n),
            "add, rms_norm and quantise": (
                lambda x=x, up=up, weight=weight: add_rms_norm_rows(x, up, weight, 1e-5),
                9 * n,
            ),
            "swiglu": (lambda x=x, up=up: swiglu(x, up), 6 * n),
            "swiglu and quantise": (lambda x=x, up=up: swiglu_rows(x, up), 7 * n),
        }
        for name, (call, n_bytes) in calls.items():
            seconds = median_seconds(call, device, runs)
            row = {"op": name, "width": width, "ms": round(1e3 * seconds, 4)}
            found.append(row | {"gb_s": round(n_bytes / seconds / 1e9)})
    return found


def _cosines(config: Config, device: torch.device) -> dict[str, object]:
    """Compare a model in fp8 with itself without, on the config's first batch."""
    path, dtype = check_files(config), choose_dtype(config.backbone.dtype, device)[0]
    mixture, _ = load_mixture(config.data, config.train.seed)
    records = mixture.batch(0, config.batch.size)
    batch = build_batch(records, Tokenizer.load(path, config.tokenizer), config.batch, config.train.seed, 0)
    embeddings, gradients, seconds = {}, {}, {}
    held = replace(config.backbone, frozen_dtype="fp8").skipped
    for name, skip in (("fp8", held), ("same", None)):
        model = build_model(path, dtype, device, causal=True, lora=config.lora, seed=0, fp8_skip=skip)

        def step(model: torch.nn.Module = model) -> None:
            model.zero_grad()
            backward_step(model, batch, config.loss, batch.n_tokens, (config.train.seed, 0), alone())

        seconds[name] = median_seconds(step, device, 3 if device.type == "cuda" else 1)
        gradients[name] = {part: p.grad.double() for part, p in model.trained().items() if p.grad.any()}
        with torch.no_grad():
            pieces = pack(batch.sequences, batch.n_tokens, device)
            embeddings[name] = torch.cat([model(piece) for piece in pieces]).double()
    by_text = F.cosine_similarity(embeddings["fp8"], embeddings["same"])
    flat = [torch.cat([g.flatten() for g in gradients[name].values()]) for name in ("fp8", "same")]
    each = {n: F.cosine_similarity(g.flatten(), gradients["same"][n].flatten(), 0) for n, g in gradients["fp8"].items()}
    worst = min(each, key=lambda name: each[name].item())
    return {
        "model": config.backbone.path, "dtype": str(dtype), "fp8_skip": list(held),
        "texts": len(by_text), "tokens": batch.n_tokens, "embeddings_mean": round(by_text.mean().item(), 4),
        "embeddings_least": round(by_text.min().item(), 4),
        "gradient": round(F.cosine_similarity(*flat, 0).item(), 4), "gradient_least": round(each[worst].item(), 4),
        "least_is": worst.removeprefix("backbone."), "step_s": round(seconds["fp8"], 3),
        "step_s_same": round(seconds["same"], 3),
    }  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.fp8", description=__doc__.split("\n\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--out", type=Path)
    return parser


if __name__ == "__main__":
    main()
