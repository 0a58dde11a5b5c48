#!/usr/bin/env bash
# The whole benchmark protocol on one GPU, in one call of at most ten minutes; writes OUT/bench.json.
#
#   scripts/bench_gpu.sh [OUT]        default: bench_gpu/
#   scripts/bench_gpu.sh --dry-run    prints the commands
#
# Needs jax with CUDA, flax, optax, orbax-checkpoint, ml_collections and torch; neither TFDS nor
# Grain. Full size (configs/aebad.py: ViT-B, WideResNet-50), bfloat16, against the twin as the
# official code runs it, tuned (bfloat16, channels last, fused AdamW) and compiled.
#
# The parts come in the order in which they are asked for, each with the time that is left. What
# had no time is named in bench.json; the same call again measures that alone, from the programs
# that were compiled (remove OUT to begin anew). BENCH_SECONDS=1200 has time for all, and for the whole run of a user that
# tries every kernel, from an empty cache.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

run=()
if [[ "${1:-}" == --dry-run ]]; then
  run=(echo)
  shift
fi
out="${1:-bench_gpu}"
"${run[@]}" mkdir -p "$out"

export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
cache="$out/xla_cache" # what one process compiled, the next reads
flags="${XLA_FLAGS:-}"
export XLA_PYTHON_CLIENT_PREALLOCATE=false # so that the peak of memory is that of the program
export TORCHINDUCTOR_CACHE_DIR="$out/inductor_cache"
seconds="${BENCH_SECONDS:-590}"
bench=(python -m mmrjax.bench --config=configs/aebad.py --window_seconds=1)

# Puts the parts together as they are; after each, so that a call that is cut off leaves a file.
missing=""
merge() {
  "${run[@]}" python - "$out" "$missing" <<'END'
import json
import pathlib
import sys

folder, missing = pathlib.Path(sys.argv[1]), sys.argv[2].split()
names = ("rates", "versus_train", "whole_run_warm", "whole_run_untuned", "whole_evaluation")
names += ("versus_evaluate", "versus_rest", "whole_run")
parts = {name: folder / f"{name}.json" for name in names}
found = {name: json.loads(path.read_text()) for name, path in parts.items() if path.exists()}
(folder / "bench.json").write_text(json.dumps({"incomplete": missing, **found}, indent=1))
END
}
trap 'kill "$!" 2>/dev/null || true; merge; exit 143' TERM INT

# Each part has its own limit, file and mark that it ended: one that is cut off loses nothing of the
# others, and leaves what it had measured. All end within BENCH_SECONDS.
failed=0
part() {
  local name="$1" limit="$2" left=$((seconds - SECONDS)) status=0
  shift 2
  limit=$((limit < left ? limit : left))
  [ ! -e "$out/$name.done" ] || return 0
  if ((limit < 10)); then
    status=124
  else
    "${run[@]}" env "JAX_COMPILATION_CACHE_DIR=$cache" "XLA_FLAGS=$flags" timeout -k 5 "$limit" \
      "${bench[@]}" "$@" "--json=$out/$name.json" &
    wait "$!" || status=$?
  fi
  if ((status)); then
    failed=$status missing="$missing $name"
    echo "$name is not complete (exit $status, limit $limit s)" >&2
  else
    "${run[@]}" touch "$out/$name.done"
  fi
  merge
}
# All as the whole run has it, so that its programs serve them: 521 images, 33 steps in a call.
bench+=(--images=521 --config.train.steps_per_call=33)
batches=("--train_batches=16,128" "--eval_batches=32,256")
recipe=(--parts=recipe --train_batches=16 --test_images=1639)
versus=(--vs=torch --only_vs --windows=3)
# Everything is compiled at once; then nothing is any more. What is most asked for comes first.
part warm_up 250 "${batches[@]}" --warm_up --vs=torch --variants=compile
part rates 75 "${batches[@]}" --requests=2000 --parts=train,evaluate,latency_ms,ceiling
part versus_train 130 "${versus[@]}" --variants=bfloat16,compile,official --train_batches=16 --eval_batches=
part whole_run_warm 90 "${recipe[@]}"
# From an empty cache, as a first run is, but without trying kernels, which is nearly all of the
# time of compiling (docs/performance.md).
cache="$out/untuned_cache" flags="$flags --xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
"${run[@]}" rm -rf "$cache"
part whole_run_untuned 130 "${recipe[@]}"
cache="$out/xla_cache" flags="${XLA_FLAGS:-}"
part versus_evaluate 80 "${versus[@]}" --variants=bfloat16,compile,official --train_batches= --eval_batches=32
part whole_evaluation 60 "${batches[@]}" --parts=gflop,with_metrics --test_images=1639
if ((seconds >= 1200)); then
  part versus_rest 120 "${versus[@]}" --variants=eager,channels_last --train_batches=16 --eval_batches=
  cache="$out/empty_cache"
  "${run[@]}" rm -rf "$cache"
  part whole_run 400 "${recipe[@]}" # took more than 220 seconds once, on an H200
fi
echo "written: $out/bench.json"
exit "$failed"
