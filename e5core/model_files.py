"""Writers of model files, one tensor in memory at a time: a Hugging Face folder's safetensors, a .gguf file.

Shapes are known before any tensor is read (the backbone on the meta device says them), so a file's head is written
first and every tensor goes to its place as it comes. `merged` adds an adapter on the way, in fp32.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
import torch
from torch import Tensor

from e5core.backbone import Backbone, BackboneConfig
from e5core.layouts import gguf_description, gguf_divisors, gguf_stored, hf_stored

SHARD_BYTES = 4 * 2**30  # of a safetensors file, its head not counted
_SAFETENSORS = {torch.float32: "F32", torch.bfloat16: "BF16"}
_GGML = {torch.float32: gguf.GGMLQuantizationType.F32, torch.bfloat16: gguf.GGMLQuantizationType.BF16}
_FILE_TYPES = {torch.float32: gguf.LlamaFileType.ALL_F32, torch.bfloat16: gguf.LlamaFileType.MOSTLY_BF16}


def shapes_of(config: BackboneConfig) -> dict[str, torch.Size]:
    """Return our names and the shapes of a decoder's tensors."""
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in Backbone(config).named_parameters()}


def merged(
    tensors: Iterable[tuple[str, Tensor]], adapter: Mapping[str, Tensor], scale: float
) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors in fp32, with scale * B A added to the adapted ones.

    adapter: "layers.0.attention.wq.lora_a" (R, in) and lora_b (out, R).
    """
    for name, tensor in tensors:
        linear = name.removesuffix(".weight")
        if f"{linear}.lora_b" in adapter:
            b, a = adapter[f"{linear}.lora_b"].float(), adapter[f"{linear}.lora_a"].float()
            tensor = torch.addmm(tensor.float(), b, a, alpha=scale)
        yield name, tensor.float()


def write_safetensors(
    folder: Path,
    shapes: Mapping[str, torch.Size],
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write tensors, which come in any order, as model-0000i-of-0000n.safetensors and their index.

    One file that holds all is model.safetensors, without an index. Layout: 8 bytes of length, a JSON head, the data.
    Raises ValueError where they are not those that `shapes` names.
    """
    files, places = _lay_out(folder, shapes, dtype, shard_bytes)
    missing = set(shapes)
    opened: list[BinaryIO] = [path.open("r+b") for path in files]
    try:
        for name, tensor in tensors:
            if name not in missing or tensor.shape != shapes[name]:
                raise ValueError(f"{name} of shape {tuple(tensor.shape)} is no tensor of this model, or came twice")
            missing.remove(name)
            number, offset = places[name]
            opened[number].seek(offset)
            opened[number].write(tensor.to(dtype).contiguous().view(torch.uint8).numpy().data)
            del tensor
    finally:
        for file in opened:
            file.close()
    if missing:
        raise ValueError(f"{len(missing)} tensors are missing, first of them {min(missing)}")


def write_hf_weights(
    folder: Path, config: BackboneConfig, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype
) -> None:
    """Write our tensors under Hugging Face's names, sharded, with an index where there are several files."""
    shapes = {}
    for name, shape in shapes_of(config).items():
        shapes[hf_stored(name, torch.empty(shape, device="meta"), config)[0]] = shape
    write_safetensors(folder, shapes, (hf_stored(name, tensor, config) for name, tensor in tensors), dtype)


def write_gguf(
    path: Path,
    config: BackboneConfig,
    tokenizer: Mapping[str, Any],
    names: Sequence[str],
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
) -> None:
    """Write a decoder as a .gguf file of an embedder.

    tokenizer: its metadata.  names: ours of all tensors.  tensors: (name, fp32) in that order.  dtype: of the matrices;
    vectors are fp32.  Raises ValueError as gguf_description does.
    """
    arch, described = gguf_description(config)
    writer, shapes, divisors = gguf.GGUFWriter(path, arch), shapes_of(config), gguf_divisors(config)
    try:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_file_type(_FILE_TYPES[dtype])
        for key, value in {**described, **tokenizer}.items():
            writer.add_key_value(key, value, _value_type(value))
        if divisors is not None:
            writer.add_tensor_info(divisors[0], (len(divisors[1]),), np.dtype(np.float32), 4 * len(divisors[1]))
        for name in names:
            kind, shape = _ggml_type(shapes[name], dtype), shapes[name]
            size = shape.numel() * dtype.itemsize if len(shape) > 1 else 4 * shape.numel()
            stored, _ = gguf_stored(name, torch.empty(shape, device="meta"), config)
            writer.add_tensor_info(stored, tuple(shape), np.dtype(np.float32), size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if divisors is not None:
            writer.write_tensor_data(np.array(divisors[1], dtype=np.float32))
        for name, tensor in tensors:
            values = gguf_stored(name, tensor, config)[1].contiguous().numpy()
            writer.write_tensor_data(gguf.quantize(values, _ggml_type(tensor.shape, dtype)))
            del tensor, values
    finally:
        writer.close()


def _lay_out(
    folder: Path, shapes: Mapping[str, torch.Size], dtype: torch.dtype, shard_bytes: int
) -> tuple[list[Path], dict[str, tuple[int, int]]]:
    """Write the heads and the index.  Returns the files, and every tensor's file (a number) and offset in it."""
    shards: list[dict[str, int]] = [{}]
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        if shards[-1] and sum(shards[-1].values()) + size > shard_bytes:
            shards.append({})
        shards[-1][name] = size
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    names = names if len(shards) > 1 else ["model.safetensors"]
    places: dict[str, tuple[int, int]] = {}
    for number, (file, shard) in enumerate(zip(names, shards, strict=True)):
        head: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, size in shard.items():
            spread = [end, end + size]
            head[name] = {"dtype": _SAFETENSORS[dtype], "shape": list(shapes[name]), "data_offsets": spread}
            places[name], end = (number, end), end + size
        text = json.dumps(head).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / file, "wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + end)
        places |= {name: (number, 8 + len(text) + places[name][1]) for name in shard}
    if len(shards) > 1:
        weight_map = {name: names[number] for name, (number, _) in places.items()}
        index = {"metadata": {"total_size": sum(sum(shard.values()) for shard in shards)}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [folder / name for name in names], places


def _ggml_type(shape: torch.Size, dtype: torch.dtype) -> gguf.GGMLQuantizationType:
    return _GGML[dtype] if len(shape) > 1 else gguf.GGMLQuantizationType.F32


def _value_type(value: Any) -> gguf.GGUFValueType:
    kinds = {
        bool: gguf.GGUFValueType.BOOL,
        int: gguf.GGUFValueType.UINT32,
        float: gguf.GGUFValueType.FLOAT32,
        list: gguf.GGUFValueType.ARRAY,
        str: gguf.GGUFValueType.STRING,
    }
    return kinds[type(value)]
