#!/usr/bin/env bash
# Runs mmrjax on Cloud TPUs: one host, a pod slice, or several slices as one. NOT RUN by its
# authors, who had no TPU: checked by shellcheck, by --dry-run and against a pretended gcloud.
#
#   export TPU_NAME=mmr TPU_ZONE=<zone> TPU_TYPE=v6e-8
#   scripts/tpu_vm.sh create              # asks for the machines and waits until they are there
#   scripts/tpu_vm.sh install             # the last commit of this checkout, on every worker
#   scripts/tpu_vm.sh run --config=configs/demo.py --workdir=gs://<bucket>/demo \
#       --config.data.data_dir=gs://<bucket>/records
#   scripts/tpu_vm.sh keep --config=…     # all three, and again after every preemption, to the end
#   scripts/tpu_vm.sh status
#   scripts/tpu_vm.sh delete
#
# Work directory and records are in a bucket, or on another storage that every worker sees; the
# machines' service account needs the roles storage.objectUser and storage.legacyBucketReader on it.
#
# `scripts/tpu_vm.sh --dry-run VERB …` prints the commands and runs none. Needs gcloud, logged in.
#
#   TPU_PROJECT   of Google Cloud; otherwise gcloud's own
#   TPU_RUNTIME   software version of the machines; otherwise by TPU_TYPE
#   TPU_SPOT=0    machines that are not taken away, at their full price
#   TPU_SLICES=n  n slices of TPU_TYPE as one program (multislice); --distributed finds them all
#   TPU_POLL=30   seconds between two looks at the state
#
# Several slices: the batch is split over all devices of all slices, and gradients cross the
# network between slices once a step. Keep train.fsdp at a number that divides the devices of one
# slice, so that the parameters it splits stay within it. When one slice is lost, the others stop
# too: `keep` makes the request anew, and the same command continues from its last checkpoint.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

usage() {
    sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" >&2
    exit 2
}

fail() {
    echo "error: $*" >&2
    exit 1
}

dry_run=""
if [ "${1:-}" = "--dry-run" ]; then
    dry_run=1
    shift
fi
[ $# -gt 0 ] || usage
verb="$1"
shift
for name in TPU_NAME TPU_ZONE TPU_TYPE; do
    [ -n "${!name:-}" ] || fail "$name is not set, see scripts/tpu_vm.sh without arguments"
done
place=(--zone="$TPU_ZONE" ${TPU_PROJECT:+--project="$TPU_PROJECT"})
everywhere=("${place[@]}" --node=all --worker=all)
queue=(gcloud compute tpus queued-resources)

do_or_show() {
    if [ -n "$dry_run" ]; then
        printf '%q ' "$@"
        echo
    else
        "$@"
    fi
}

runtime() {
    case "$TPU_TYPE" in
        v6e-*) echo v2-alpha-tpuv6e ;;
        v5p-*) echo v2-alpha-tpuv5 ;;
        v5litepod-*) echo v2-alpha-tpuv5-lite ;;
        v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
        *) fail "no runtime is known for TPU_TYPE=$TPU_TYPE; set TPU_RUNTIME" ;;
    esac
}

# One word, such as ACTIVE or SUSPENDED (taken away); nothing where there is no such request.
state() {
    "${queue[@]}" describe "$TPU_NAME" "${place[@]}" --format='value(state.state)' 2>/dev/null || true
}

create() {
    local version nodes spot
    version="${TPU_RUNTIME:-$(runtime)}"
    nodes=(--node-id="$TPU_NAME")
    [ "${TPU_SLICES:-1}" = 1 ] || nodes=(--node-count="$TPU_SLICES" --node-prefix="$TPU_NAME")
    spot=(--spot)
    [ "${TPU_SPOT:-1}" = 1 ] || spot=()
    do_or_show "${queue[@]}" create "$TPU_NAME" "${place[@]}" --accelerator-type="$TPU_TYPE" \
        --runtime-version="$version" "${nodes[@]}" "${spot[@]}"
    if [ -n "$dry_run" ]; then
        do_or_show "${queue[@]}" describe "$TPU_NAME" "${place[@]}" --format='value(state.state)'
        return
    fi
    local now="" seen=""
    while [ "$now" != ACTIVE ]; do
        now="$(state)"
        [ "$now" = "$seen" ] || echo "$TPU_NAME: $now"
        seen="$now"
        case "$now" in
            ACTIVE) ;;
            FAILED | SUSPENDING | SUSPENDED) fail "$TPU_NAME is $now; delete it and ask again" ;;
            *) sleep "${TPU_POLL:-30}" ;;
        esac
    done
}

# Python 3.12 by uv: the machines' own is older than the 3.11 that mmrjax needs.
install() {
    local archive="${TMPDIR:-/tmp}/mmrjax-$TPU_NAME.tar.gz"
    do_or_show git -C "$root" archive --format=tar.gz --output="$archive" HEAD &&
        do_or_show "${queue[@]}" scp "$archive" "$TPU_NAME:mmrjax.tar.gz" "${everywhere[@]}" &&
        do_or_show "${queue[@]}" ssh "$TPU_NAME" "${everywhere[@]}" --command="set -e
rm -rf mmrjax-source && mkdir mmrjax-source && tar -xzf mmrjax.tar.gz -C mmrjax-source
python3 -m pip install --quiet --user uv
python3 -m uv venv --quiet --allow-existing --python 3.12 mmrjax-env
python3 -m uv pip install --quiet --python mmrjax-env/bin/python './mmrjax-source[tpu,gcs]'"
}

run() {
    local words
    words="$(printf '%q ' "$@")"
    do_or_show "${queue[@]}" ssh "$TPU_NAME" "${everywhere[@]}" \
        --command="mmrjax-env/bin/python -m mmrjax.main --distributed ${words% }"
}

delete() {
    do_or_show "${queue[@]}" delete "$TPU_NAME" "${place[@]}" --force --quiet
}

# Whether the machines go away within a few looks: a lost connection is noticed before the state.
taken_away() {
    for _ in 1 2 3 4 5 6; do
        [ "$(state)" = ACTIVE ] || return 0
        sleep "${TPU_POLL:-30}"
    done
    return 1
}

keep() {
    if [ -n "$dry_run" ]; then
        create
        install
        run "$@"
        return
    fi
    while true; do
        case "$(state)" in
            ACTIVE) ;;
            "") create ;;
            *) # taken away, or never given
                delete
                create
                ;;
        esac
        if install && run "$@"; then
            return
        fi
        taken_away || fail "the command failed on machines that are still there, see above"
        echo "$TPU_NAME was taken away; asking again, the command continues from its checkpoint"
    done
}

case "$verb" in
    create | install | delete)
        [ $# -eq 0 ] || fail "$verb takes no arguments, it got $1"
        "$verb"
        ;;
    run | keep)
        [ $# -gt 0 ] || fail "$verb needs the arguments of mmrjax.main, such as --config=… --workdir=…"
        "$verb" "$@"
        ;;
    status) do_or_show "${queue[@]}" describe "$TPU_NAME" "${place[@]}" --format='value(state.state)' ;;
    *) fail "unknown verb $verb; known: create, install, run, keep, status, delete" ;;
esac
