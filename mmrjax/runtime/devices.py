"""The devices of this machine, the cores of a CPU as devices, and the memory of the process.

A program calls `keep_freed` and `show_cores` before JAX begins; a library that somebody imports
calls neither of them.
"""

import ctypes
import math
import os
import pathlib
from collections.abc import Iterable

import jax

GIB_OF_A_CORE = 4  # of the machine's memory, for the weights, moments and images of a device
# The limits of control groups, versions 2 and 1.
CPU_QUOTA = "/sys/fs/cgroup/cpu.max"
CPU_QUOTA_1 = ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us")
MEMORY_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
# Parameters of mallopt, from malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def available() -> list[jax.Device]:
    """All devices of all processes.

    Raises:
      RuntimeError: JAX cannot use the kind of device that JAX_PLATFORMS asks for.
    """
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as e:  # AssertionError: no plugin is installed
        asked = jax.config.jax_platforms
        reason = " ".join(str(e).partition(" (set JAX_PLATFORMS")[0].split())
        reason = reason or "no such backend is installed"
        raise RuntimeError(
            f"JAX_PLATFORMS={asked}: no such device can be used here ({reason}); unset it to take "
            "what there is, or install the driver and mmrjax with the extra cuda12, cuda13 or tpu"
        ) from e


def on_nvidia() -> bool:
    """Whether the devices are NVIDIA's GPUs."""
    device = jax.devices()[0]
    return device.platform == "gpu" and "cuda" in device.client.platform_version


def show_cores(batch_sizes: Iterable[int] = ()) -> None:
    """Makes each core of a CPU a device of JAX: as many cores as divide every batch size.

    XLA:CPU splits most operations badly over the threads of one device (docs/performance.md). As
    devices, the cores compute images of their own. At most one core for every GIB_OF_A_CORE of
    memory becomes a device: the full student with its moments takes 1.6 GiB on each. The call
    changes nothing if JAX runs already, or if JAX_NUM_CPU_DEVICES or XLA_FLAGS sets the number.
    """
    by_flag = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if by_flag or jax.config.jax_num_cpu_devices >= 0:
        return
    most = max(1, int(min(cores(), _memory_gib() / GIB_OF_A_CORE)))
    shared = math.gcd(*batch_sizes)  # 0 without batch sizes: every number divides 0
    count = max(n for n in range(1, most + 1) if shared % n == 0)
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # JAX runs already
        return


def are_shown_cores() -> bool:
    """Whether JAX's devices are cores of a CPU, and the user has not set how many."""
    by_user = os.environ.get("JAX_NUM_CPU_DEVICES")
    return jax.default_backend() == "cpu" and jax.config.jax_num_cpu_devices > 0 and not by_user


def cores() -> int:
    """Cores that this process may use: its affinity and quota; threads of a core count once."""
    try:
        threads = os.sched_getaffinity(0)
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1
    siblings = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    count = len({_read(siblings.format(n)) or str(n) for n in threads})
    quota, period = (_read(CPU_QUOTA) or " ".join(f"{_read(path)}" for path in CPU_QUOTA_1)).split()
    if quota.isdecimal() and period.isdecimal():
        count = min(count, math.ceil(int(quota) / int(period)))
    return max(1, count)


def keep_freed() -> bool:
    """Tells malloc to keep and reuse large blocks, before the first array exists.

    XLA:CPU takes the temporary memory of a program in one block per call and frees it afterwards.
    glibc gives a block of that size back to the system at once, and the next call pays for every
    page again: 75,000 page faults and 138 of 631 ms of processor time in the gradient of a small
    encoder.

    Returns:
      Whether malloc understood: False without glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # macOS, musl
        return False
    # No mapping per block, no trimming of the heap, and one heap only: the heaps of other threads
    # cannot grow as large as such a block and would map it after all.
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_ARENA_MAX, 1))
    return all([mallopt(name, value) == 1 for name, value in settings])


def _memory_gib() -> float:
    """Memory of the machine, or what the control group of this process may use."""
    limits = (_read(path) or "" for path in MEMORY_LIMITS)
    sizes = [int(limit) for limit in limits if limit.isdecimal()]
    try:
        sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):  # no POSIX, or the system does not say
        pass
    return min(sizes, default=math.inf) / 2**30


def _read(path: str) -> str | None:
    try:
        return pathlib.Path(path).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
