#!/usr/bin/env bash
# Runs mmrjax on the GPUs of several nodes under SLURM, one process per GPU. NOT RUN on a cluster by
# its authors: checked by shellcheck, by --dry-run, and with two CPU processes that a pretended srun
# starts with SLURM's variables.
#
#   sbatch --nodes=2 --gpus-per-node=4 --ntasks-per-node=4 scripts/slurm.sh \
#       --config=configs/aebad.py --workdir=<shared folder> --config.data.raw_dir=<shared folder>
#   scripts/slurm.sh --dry-run --config=…    # prints the command, starts nothing
#
# Submit from the checkout, or any folder whose environment has mmrjax: the job uses .venv there, or
# what MMRJAX_PYTHON names. Work directory, raw data and records (--config.data.data_dir) must lie
# where all nodes see them.
#
# Every process must see all GPUs of its node and takes the one of its number: ask with
# --gpus-per-node, not with --gpus-per-task, which hides the others. Where the cluster hides them
# all the same, `export JAX_LOCAL_DEVICE_IDS=0` before sbatch makes each take the one it sees.
#
# Two minutes before the time limit the training saves and the job puts itself into the queue again;
# a job that SLURM preempts and requeues continues too, from the last checkpoint (at most a minute
# old). scancel ends it.
#SBATCH --job-name=mmrjax
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=mmrjax-%j.log
#SBATCH --signal=B:USR1@120
set -euo pipefail

dry_run=""
if [ "${1:-}" = "--dry-run" ]; then
    dry_run=1
    shift
fi
if [ $# -eq 0 ]; then
    echo "error: give the arguments of mmrjax.main, such as --config=… --workdir=…" >&2
    exit 2
fi
python="${MMRJAX_PYTHON:-.venv/bin/python}"
[ -n "${MMRJAX_PYTHON:-}" ] || [ -x "$python" ] || python=python
cpus=(${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"}) # srun does not inherit it
command=(srun --kill-on-bad-exit=1 "${cpus[@]}" "$python" -m mmrjax.main --distributed "$@")
if [ -n "$dry_run" ]; then
    printf '%q ' "${command[@]}"
    echo
    exit
fi

out_of_time=""
# Set before the step is there: a signal that nobody expects would end the job without a word. srun
# hands it on to every process.
trap 'out_of_time=1; [ -z "${!:-}" ] || kill -TERM "$!" || true' USR1
[ -z "$out_of_time" ] || exec scontrol requeue "$SLURM_JOB_ID"
"${command[@]}" &
step=$!
status=0
wait "$step" || status=$?
while [ -n "$out_of_time" ] && kill -0 "$step" 2>/dev/null; do # the signal ended `wait`, not srun
    status=0
    wait "$step" || status=$?
done
if [ -n "$out_of_time" ] && [ "$status" -ne 0 ]; then
    echo "out of time; into the queue again"
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
