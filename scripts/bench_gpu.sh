#!/usr/bin/env bash
# The whole benchmark protocol on one GPU, in one call of at most ten minutes; writes OUT/bench.json.
#
#   scripts/bench_gpu.sh [OUT]        default: bench_gpu/
#   scripts/bench_gpu.sh --dry-run    prints the commands
#
# Needs jax with CUDA, flax, optax, orbax-checkpoint, ml_collections and torch; neither TFDS nor
# Grain. Full size (configs/aebad.py: ViT-B, WideResNet-50), bfloat16, against the twin as the
# official code runs it, tuned (bfloat16, channels last, fused AdamW) and compiled.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

run=()
if [[ "${1:-}" == --dry-run ]]; then
  run=(echo)
  shift
fi
out="${1:-bench_gpu}"
"${run[@]}" rm -rf "$out"/empty_cache* "$out"/*.json
"${run[@]}" mkdir -p "$out"

export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
cache="$out/xla_cache"                              # what one process compiled, the next reads
flags="${XLA_FLAGS:-}"
export XLA_PYTHON_CLIENT_PREALLOCATE=false          # so that the peak of memory is that of the program
export TORCHINDUCTOR_CACHE_DIR="$out/inductor_cache"
bench=(python -m mmrjax.bench --config=configs/aebad.py --window_seconds=1)

# Each part has its own limit and file: one that is cut off loses nothing of the others. All end
# within 590 seconds, or within BENCH_SECONDS.
failed=0
part() {
  local name="$1" limit="$2" left=$((${BENCH_SECONDS:-590} - SECONDS))
  shift 2
  limit=$((limit < left ? limit : left))
  if ((limit < 10)); then
    echo "no time left for $name" >&2
    failed=124
    return
  fi
  local status=0
  "${run[@]}" env "JAX_COMPILATION_CACHE_DIR=$cache" "XLA_FLAGS=$flags" timeout -k 5 "$limit" "${bench[@]}" "$@" "--json=$out/$name.json" || status=$?
  if ((status)); then
    failed=$status
    ((status != 124 && status != 137)) || echo "$name was cut off after $limit seconds" >&2
  fi
}
# All as the whole run has it, so that its programs serve them: 521 images, 33 steps in a call.
bench+=(--images=521 --config.train.steps_per_call=33)
batches=("--train_batches=16,128" "--eval_batches=32,256")
recipe=(--parts=recipe --train_batches=16 --test_images=1639)
versus=(--vs=torch --only_vs --windows=3 "--variants=bfloat16,compile,official")
# Everything is compiled at once; then nothing is any more. What is most asked for comes first.
part warm_up 250 "${batches[@]}" --warm_up --vs=torch --variants=compile
part model 90 "${batches[@]}" --requests=2000 --test_images=1639 \
  --parts=ceiling,gflop,train,evaluate,latency_ms,with_metrics
part versus_train 150 "${versus[@]}" --train_batches=16 --eval_batches=
part whole_run_warm 100 "${recipe[@]}"
# From an empty cache, as a first run is: without trying kernels, which is nearly all of the time of
# compiling (docs/performance.md), and as a user has it. That took more than 220 seconds once, on an
# H200. BENCH_SECONDS=1200 gives it its time where the other parts leave it none.
cache="$out/empty_cache_untuned"
flags="${XLA_FLAGS:-} --xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
part whole_run_untuned 130 "${recipe[@]}"
cache="$out/xla_cache" flags="${XLA_FLAGS:-}"
part versus_evaluate 100 "${versus[@]}" --train_batches= --eval_batches=32
cache="$out/empty_cache"
part whole_run 400 "${recipe[@]}"

"${run[@]}" python - "$out" <<'END'
import json
import pathlib
import sys

folder = pathlib.Path(sys.argv[1])
names = ("model", "versus_train", "versus_evaluate", "whole_run_warm", "whole_run_untuned", "whole_run")
parts = {name: folder / f"{name}.json" for name in names}
found = {name: json.loads(path.read_text()) for name, path in parts.items() if path.exists()}
(folder / "bench.json").write_text(json.dumps(found, indent=1))
print(f"written: {folder / 'bench.json'} ({', '.join(found) or 'nothing'})")
END
exit "$failed"
