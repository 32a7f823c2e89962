#!/usr/bin/env bash
# On a machine with a GPU: bash bench/gpu_check.sh tests|ops|step|entry [backbone.KEY=VALUE]
# Results go to $OUT (or bench/results), row by row. A second word is another form of ours: for step beside the first, in
# place of fp8 (all linears in fp8: backbone.frozen_dtype=fp8,backbone.fp8_skip=[]), for entry in its place.
# Each part ends within 9 minutes on one H100 from a bare machine; the estimates below are not measured.
#
#   tests  every kernel against its reference at Mistral-7B's shapes, odd lengths and texts of one token, then the
#          kernels' other tests on CUDA                                        est. 5 min, most of it Triton's compiler
#   ops    roofline, then one bench an op                                       est. 6 min, most of it torch.compile
#   step   where the time of a step on W64 goes, planned memory beside the card's own count (within 10%; a dry run of
#          the same: --dry), the step on W64, 512 and 2,048 triples beside transformers + PEFT             est. 8 min
#   entry  the real entry at full size, killed, resumed, exported; encoding beside sentence-transformers   est. 8 min
#
# Needs torch with CUDA, triton, pytest (with xdist), transformers, peft, sentence-transformers and e5core's own
# requirements; installs nothing.
#
# Where a machine is lent through the tool `device` (nothing is fetched there, 15 minutes a task, so one or two parts),
# carry what its image lacks. Here, once, in the repository's root:
#   echo /.whl/ >> .git/info/exclude
#   for p in pydantic==2.14.3 pydantic-core==2.50.4 annotated-types typing-inspection typing-extensions==4.16.0 \
#            gguf==0.19.0 pytrec-eval-terrier==0.5.11 tomli-w==1.2.0; do
#     python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
#       --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_24_x86_64 \
#       --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform manylinux1_x86_64 -d .whl $p; done
# then call run with carry [".whl"], timeout_s 560 and the command
#   python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .whl/*.whl \
#     && export PYTHONPATH=/tmp/site || exit; bash bench/gpu_check.sh step
# and give_back unless another part follows at once.
set -uo pipefail
shopt -s nullglob
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH=.:kernels${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
out=${OUT:-bench/results}
mkdir -p "$out"
variant=(--variant "${2:-backbone.frozen_dtype=fp8}")
override=(${2:+--override "$2"})
failed=0

# part NAME SECONDS COMMAND...: one command, its lines also in $out/NAME.log as they come; a failure stops no other
part() {
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  [ "$limit" -gt 20 ] || { echo "== $name: no time is left"; failed=1; return; }
  timeout "$limit" "$@" 2>&1 | grep --line-buffered -v '^USDT:' | tee -a "$out/$name.log"
  local status=${PIPESTATUS[0]}
  echo "== $name: status $status after $((SECONDS - start)) s, $SECONDS s in all"
  [ "$status" -eq 0 ] || failed=1
}

python3 -c 'import torch; assert torch.cuda.is_available(), "no GPU here"; print(torch.cuda.get_device_name())' || exit 1

case ${1:-} in
tests)
  mapfile -t marked < <(grep -l 'pytest.mark.gpu' tests/test_*.py)
  part tests 240 python3 -m pytest -v -n 6 -p no:cacheprovider -m gpu "${marked[@]}"
  part tests 270 python3 -m pytest -v -n 8 -p no:cacheprovider -m "not gpu and not slow" \
    tests/test_*_triton.py tests/test_{infonce,infonce_rows,last_token,lora_linear,spare_columns}.py \
    tests/test_fp8{,_linear,_rooms}.py  # not _model, whose runs are of one process a rank and in fp32: the CPU's
  ;;
ops)
  part ops 60 python3 -m bench.roofline --device cuda --size 7b --out "$out/ops.jsonl"
  # the quickest and the most asked for first; an op more is a word more
  for op in rms_norm rope swiglu last_token attention lora_linear dropout infonce; do
    part ops 150 python3 -m bench."$op" --device cuda --size 7b --rep-ms 50 --out "$out/ops.jsonl"
    [ "$SECONDS" -lt 400 ] || { echo "== no time for what comes after $op"; break; }
  done
  ;;
step)
  part step 130 python3 -m bench.step_profile --device cuda --random 7b --triples 64 --out "$out/step.jsonl" "${variant[@]}"
  part step 60 python3 -m bench.plan --random 7b --config configs/e5_mistral_7b.toml --tokens 8192 --out "$out/step.jsonl"
  part step $((530 - SECONDS)) python3 -m bench.train_step --device cuda --random 7b --row-deadline $((390 - SECONDS)) \
    --out "$out/step.jsonl" "${variant[@]}"
  ;;
entry)
  work=$(mktemp -d)
  part entry 420 python3 -m bench.full_size --work "$work" --device cuda --keep --out "$out/entry.jsonl" "${override[@]}"
  part entry $((530 - SECONDS)) python3 -m bench.encode --device cuda --model "$work/model" --texts 1000 \
    --peer-dtypes bfloat16 --batch 64 --runs 1 --out "$out/entry.jsonl"
  ;;
*)
  echo "usage: bash bench/gpu_check.sh tests|ops|step|entry [backbone.KEY=VALUE]" >&2
  exit 2
  ;;
esac
exit $failed
