"""Packages of e5core: the program `e5core` and its kernels `e5kernels`, which live under kernels/ (src layout)."""

from setuptools import find_packages, setup

setup(
    name="e5core",
    version="0.1.0",
    description="Turn a decoder language model into a text-embedding model: packed, LoRA, exact large batches.",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["e5core", "e5core.*"]) + find_packages("kernels"),
    package_dir={"e5kernels": "kernels/e5kernels"},
    install_requires=[
        "torch>=2.11",
        'triton; platform_system == "Linux"',  # no version: a CUDA build of torch brings the one that it was built with
        "safetensors",
        "sentencepiece",
        "numpy",
        "aiohttp",
        "pydantic>=2.12",  # checks types and ranges of the config; 2.12 can forbid unknown keys per call
        "rich",  # progress on a terminal
        "tokenizers",  # byte-pair tokenizers: tokenizer.json or built from GGUF metadata
        "gguf",  # reads .gguf files and dequantises their tensors
        "scipy",  # Spearman correlation of the STS sets
        "scikit-learn",  # logistic regression of the classification sets
        "pytrec-eval-terrier",  # nDCG and recall as trec_eval counts them; the build of pytrec_eval that ships wheels
        "tomli-w",  # writes RUN/config.toml: the standard library reads TOML and does not write it
    ],
    extras_require={
        "test": [
            "pytest",
            "ruff",  # `make test` lints too
            "setuptools",  # tests/test_packaging.py reads this file through it; Python 3.12 no longer ships it
            "transformers",  # oracle of the backbone
            "peft",  # oracle of the LoRA
            "mistral-common",  # carries the tokenizer file of Mistral-7B
        ],
        "oracle": ["xllamacpp"],  # llama.cpp: `pytest -m slow` derives the tokenizer fixtures' ids from it again
    },
)
