"""Cores of a CPU are devices as far as memory, quota and batches allow; freed memory is kept."""

import os
import subprocess
import sys

import pytest
from PIL import Image

from mmrjax.runtime import devices

SHOWN = """
import jax
from mmrjax.runtime import devices
devices.cores, devices._memory_gib = lambda: 6, lambda: 64.0
for sizes in ([16, 32], [9, 12], [5, 16], []):
    devices.show_cores(sizes)
    print(jax.config.jax_num_cpu_devices, end=" ")
    jax.config.update("jax_num_cpu_devices", -1)
devices._memory_gib = lambda: 11.0
devices.show_cores([8])
print(jax.device_count(), end=" ")
devices.show_cores([6])  # JAX runs: too late, and no error
print(jax.device_count(), devices.are_shown_cores())
"""


def in_a_new_process(code, **variables):
    left_out = ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES", "JAX_COMPILATION", "JAX_PERSISTENT_CACHE")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(left_out)}
    environment = {**kept, "JAX_PLATFORMS": "cpu", **variables}
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    return found.stdout.split()


@pytest.mark.parametrize(
    ("variables", "counts"),
    [
        ({}, "4 3 1 6 2 2 True"),
        ({"JAX_NUM_CPU_DEVICES": "2"}, "2 3 1 6 2 2 False"),  # set: left as it is, the first time
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}, "-1 -1 -1 -1 3 3 False"),
    ],
)
def test_cores_are_devices_as_far_as_batches_memory_and_the_user_allow(variables, counts):
    assert in_a_new_process(SHOWN, **variables) == counts.split()


STARTED = """
import pathlib, sys
import jax
from mmrjax import main
from mmrjax.bench import __main__ as bench
from mmrjax.predict import __main__ as predict
from mmrjax.runs import restore
from mmrjax.runtime import devices
devices.cores, devices._memory_gib = lambda: 2, lambda: 64.0
def stop(*_, **__):
    jax.jit(lambda x: x + 1)(1)
    print(jax.device_count())
    sys.exit(0)
main.run_all = bench._run = restore.trained = stop
restore.find_run = pathlib.Path
program, *arguments = {words!r}
getattr(sys.modules[__name__], program).main(arguments)
"""


@pytest.mark.parametrize(
    ("words", "devices"),
    [
        (("main", "--config=configs/demo.py", "--workdir={folder}/run"), 2),
        (
            (
                "main",
                "--config=configs/demo.py",
                "--workdir={folder}/run",
                "--config.eval.batch_size=3",
            ),
            1,
        ),
        (("predict", "--workdir={folder}", "--input={folder}", "--output={folder}/out"), 2),
        (("bench", "--vs=torch"), 2),
        (("bench", "--train_batches=1,16"), 1),
    ],
)
def test_programs_show_the_cores_before_jax_runs_and_keep_what_they_compile(
    words, devices, tmp_path
):
    """Not the benchmarks, which measure how long compiling takes."""
    if "--vs=torch" in words:
        pytest.importorskip("torch")
    code = STARTED.format(words=tuple(word.format(folder=tmp_path) for word in words))
    if words[0] == "predict":
        (tmp_path / "config.json").write_text("{}")
        for name in "ab":  # a single picture cannot be shared among cores
            Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
        code = code.replace("program, ", CONFIG + "program, ")
    assert in_a_new_process(code, HOME=str(tmp_path)) == [str(devices)]
    entries = list(tmp_path.glob(".cache/mmrjax/xla/jit__lambda*-cache"))
    assert len(entries) == (words[0] in ("main", "predict"))


CONFIG = """
from mmrjax.runtime import config
restore.read_config = lambda run: config.load("configs/demo.py")
"""


def test_memory_is_what_the_control_group_allows(monkeypatch, tmp_path):
    for name, text in (("max", "max\n"), ("limit", f"{3 << 30}\n")):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 5 << 18, "SC_PAGE_SIZE": 4096}.get)
    for names, gib in ((("max", "limit"), 3), (("max", "absent"), 5)):
        limits = [str(tmp_path / name) for name in names]
        monkeypatch.setattr(devices, "MEMORY_LIMITS", limits)
        assert devices._memory_gib() == gib
    monkeypatch.delattr(os, "sysconf")
    assert devices._memory_gib() == float("inf")


def test_threads_of_one_core_count_once_and_a_quota_limits_them(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    siblings = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    known = {siblings.format(n): f"{n % 2},{n % 2 + 2}" for n in range(4)}
    monkeypatch.setattr(devices, "_read", lambda path: known.get(path))
    assert devices.cores() == 2
    known.clear()  # the system does not say
    assert devices.cores() == 4
    known[devices.CPU_QUOTA] = "max 100000"
    assert devices.cores() == 4
    known[devices.CPU_QUOTA] = "250000 100000"
    assert devices.cores() == 3
    known.clear()
    known.update(zip(devices.CPU_QUOTA_1, ("150000", "100000"), strict=True))
    assert devices.cores() == 2
    known[devices.CPU_QUOTA_1[0]] = "-1"
    assert devices.cores() == 4


FAULTS = """
import resource, sys
import numpy as np
from mmrjax.runtime import devices

if sys.argv[1] == "keep":
    assert devices.keep_freed()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for _ in range(2):
    before = faults()
    block = np.full(1 << 25, 1, np.uint8)  # 8192 pages of 4 KiB, above every mmap threshold
    block = np.full(1 << 26, 1, np.uint8)
    del block
    print(faults() - before)
"""


def page_faults(mode):
    command = [sys.executable, "-c", FAULTS, mode]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [int(line) for line in done.stdout.split()]


def test_a_large_block_is_faulted_in_once():
    if not has_mallopt():
        pytest.skip("needs glibc")
    first, second = page_faults("keep")
    assert second < first / 10
    assert min(page_faults("as it is")) > 100 * max(second, 1)


def has_mallopt():
    """Asked in another process: it cannot be undone in this one."""
    probe = "from mmrjax.runtime import devices; print(devices.keep_freed())"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    return done.stdout.strip() == "True"
