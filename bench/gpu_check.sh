#!/usr/bin/env bash
# Run on a machine with a GPU: the GPU tests, the kernel tests on CUDA, and the benches; results go to $OUT (or bench/results).
# Needs torch with CUDA, triton, pytest and e5core's dependencies; installs nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH=.:kernels
out=${OUT:-bench/results}

python -c 'import torch; assert torch.cuda.is_available(), "no GPU here"; print(torch.cuda.get_device_name())'
python -m pytest -q -p no:cacheprovider -m "gpu or not slow" tests/test_infonce*.py tests/test_last_token.py tests/test_*_triton.py
python -m pytest -q -p no:cacheprovider -m gpu tests
python -m pytest -q -p no:cacheprovider tests/test_shipped_configs.py # a tiny model of every family, trained on the GPU
python -m bench.train_step --device cuda --batch 64 --micro-batch-tokens 8192 --out "$out/train_step.jsonl"
python -m bench.plan --device cuda --tokens 4096 16384 --out "$out/plan.jsonl"
