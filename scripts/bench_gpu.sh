#!/usr/bin/env bash
# The whole benchmark protocol on one GPU, at most ten minutes a call; writes OUT/bench.json.
#
#   scripts/bench_gpu.sh [OUT]        default: bench_gpu/
#   scripts/bench_gpu.sh --dry-run    prints the commands
#
# Needs jax with CUDA, flax, optax, orbax-checkpoint, ml_collections and torch; neither TFDS nor
# Grain. Full size (configs/aebad.py: ViT-B, WideResNet-50), bfloat16, against the twin as the
# official code runs it, tuned (bfloat16, channels last, fused AdamW) and compiled.
#
# The parts come in the order in which they are asked for. Whether one call has time for all depends
# on how long compiling takes: bench.json names what is missing, and the same call again measures
# that from the programs that were compiled, first what was not tried yet, then the rest with all
# the time that is left. Remove OUT to begin anew. BENCH_SECONDS=1200 also has time for the whole
# run of a user that tries every kernel, from an empty cache.
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

names="rates versus_train whole_run_warm whole_run_untuned versus_evaluate whole_evaluation"
((seconds < 1200)) || names="$names versus_rest whole_run"

# Puts the parts together as they are; after each, so that a call that is cut off leaves a file.
merge() {
  # shellcheck disable=SC2086  # words of their own
  "${run[@]}" python - "$out" $names <<'END'
import json
import pathlib
import sys

folder, names = pathlib.Path(sys.argv[1]), sys.argv[2:]
missing = [name for name in names if not (folder / f"{name}.done").exists()]
both = {name: [folder / f"{name}.{end}" for end in ("json", "part")] for name in names}
there = {name: next((p for p in paths if p.exists()), None) for name, paths in both.items()}
found = {name: json.loads(path.read_text()) for name, path in there.items() if path}
(folder / "bench.json").write_text(json.dumps({"incomplete": missing, **found}, indent=1))
END
}
trap 'kill "${!:-0}" 2>/dev/null || true; merge; exit 143' TERM INT

# Each part has its own limit, file and mark that it ended: one that is cut off loses nothing of the
# others, and leaves what it had measured unless an earlier call had some. All end within
# BENCH_SECONDS.
failed=0 again="" tried=" $(cd "$out" 2>/dev/null && echo *.tried || true) "
part() {
  local name="$1" limit="$2" left=$((seconds - SECONDS)) status=0 before=""
  shift 2
  [ ! -e "$out/$name.done" ] || return 0
  [[ "$tried" != *" $name.tried "* ]] || before=1
  if [ "$name" != warm_up ]; then
    [ "$before" = "$again" ] || return 0
    [ -z "$again" ] || limit="$left"
  fi
  limit=$((limit < left ? limit : left))
  if ((limit < 10)); then
    status=124
  else
    "${run[@]}" touch "$out/$name.tried"
    "${run[@]}" env "JAX_COMPILATION_CACHE_DIR=$cache" "XLA_FLAGS=$flags" timeout -k 5 "$limit" \
      "${bench[@]}" "$@" "--json=$out/$name.part" &
    wait "$!" || status=$?
  fi
  if ((status)); then
    failed=$status
    echo "$name is not complete (exit $status, limit $limit s)" >&2
  else
    "${run[@]}" touch "$out/$name.done"
  fi
  if [ -e "$out/$name.part" ] && { ((status == 0)) || [ ! -e "$out/$name.json" ]; }; then
    mv "$out/$name.part" "$out/$name.json"
  fi
  merge
}
# All as the whole run has it, so that its programs serve them: 521 images, 33 steps in a call.
bench+=(--images=521 --config.train.steps_per_call=33)
batches=("--train_batches=16,128" "--eval_batches=32,256")
recipe=(--parts=recipe --train_batches=16 --test_images=1639)
versus=(--vs=torch --only_vs --windows=3)
fast=--variants=bfloat16,compile,official
untuned="--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
protocol() {
  part rates 75 "${batches[@]}" --requests=2000 --parts=train,evaluate,latency_ms,ceiling
  part versus_train 130 "${versus[@]}" "$fast" --train_batches=16 --eval_batches=
  part whole_run_warm 90 "${recipe[@]}"
  # From an empty cache, as a first run is, but without trying kernels, which seems to be nearly all
  # of the time of compiling (docs/performance.md).
  cache="$out/untuned_cache" flags="${XLA_FLAGS:-} $untuned"
  [ -e "$out/whole_run_untuned.done" ] || "${run[@]}" rm -rf "$cache"
  part whole_run_untuned 130 "${recipe[@]}"
  cache="$out/xla_cache" flags="${XLA_FLAGS:-}"
  part versus_evaluate 80 "${versus[@]}" "$fast" --train_batches= --eval_batches=32
  part whole_evaluation 60 "${batches[@]}" --parts=gflop,with_metrics --test_images=1639
  ((seconds >= 1200)) || return 0
  part versus_rest 120 "${versus[@]}" --variants=eager,channels_last --train_batches=16 --eval_batches=
  cache="$out/empty_cache"
  [ -e "$out/whole_run.done" ] || "${run[@]}" rm -rf "$cache"
  part whole_run 400 "${recipe[@]}" # took more than 220 seconds once, on an H200
  cache="$out/xla_cache"
}
# Everything is compiled at once; then nothing is any more. What is most asked for comes first.
part warm_up 250 "${batches[@]}" --warm_up --vs=torch --variants=compile
protocol
again=1
protocol
merge
echo "written: $out/bench.json"
exit "$failed"
