"""Several processes as one program: which process writes, and what all of them decide together.

Every process runs the same program in the same order, because all processes must start a
computation on the devices together. Only the first process writes files (`first`). Clocks and
signals differ from process to process, and `agree` settles them. A single process pays nothing for
this.
"""

import itertools
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

T = TypeVar("T")

PATIENCE_SECONDS = 24 * 3600  # for work of the first process alone: building records, metrics
FAREWELL_SECONDS = 5  # that a failed process gives the others to fail by themselves
# Errors of the first process that the others raise with the same type; subclasses come first.
ERRORS = (FileNotFoundError, OSError, FloatingPointError, ValueError, RuntimeError)

_barriers = itertools.count()


class Interrupted(Exception):
    """A signal asked the run to stop, and its state is saved. `args`: message, signal number."""


class StopRequest:
    """Notes SIGTERM and Ctrl-C inside a `with` block, so that the loop can save before it leaves.

    The first signal is noted in `signal`; the second has its usual effect.
    """

    signal = 0  # the number of the noted signal, 0 before

    def __enter__(self):
        """Installs the handlers, in the main thread only: Python forbids it in another thread."""
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def _note(self, number, frame):
        self.signal = number
        logging.warning("stopping after this step; a second signal stops at once")
        self.__exit__()

    def __exit__(self, *exception):
        """Restores the previous handlers."""
        while self._previous:
            signal.signal(*self._previous.popitem())


def initialize(coordinator: str | None, processes: int | None, index: int | None) -> None:
    """Joins the processes, before anything else uses JAX.

    An argument of None is taken from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES or JAX_PROCESS_ID
    in the environment, or from TPU pods, SLURM or Open MPI.

    Args:
      coordinator: host:port on which the first process listens.
      processes: their number.
      index: number of this process, from 0.

    Raises:
      ValueError: too little is known, or the processes do not find each other.
    """
    # JAX's own service would swallow SIGTERM; `StopRequest` and `agree` do more.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS"),
            _number("JAX_NUM_PROCESSES", processes),
            _number("JAX_PROCESS_ID", index),
        )
    except (ValueError, RuntimeError) as e:
        raise ValueError(
            f"--distributed: {e} TPU pods, SLURM and Open MPI are recognised; elsewhere give every "
            "process --coordinator=host:port --num_processes=N --process_id=K"
        ) from e
    if not is_first():
        logging.set_verbosity(logging.WARNING)
    logging.info("process %d of %d", jax.process_index(), jax.process_count())


def count() -> int:
    """The number of processes; touches no device if there can be only one."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def is_first() -> bool:
    """Whether this process writes the files and prints."""
    return count() == 1 or jax.process_index() == 0


def own_name() -> str:
    """The beginning of a message, as in "process 1 of 4: "; empty for a single process."""
    return f"process {jax.process_index()} of {count()}: " if count() > 1 else ""


def first(work: Callable[[], T]) -> T:
    """Calls a function in the first process alone, while the others wait.

    Args:
      work: uses no device; returns a value that JSON can hold.

    Returns:
      The result of `work` in every process (lists arrive as tuples).

    Raises:
      OSError, ValueError, …: the error of `work`, in every process.
    """
    if count() == 1:
        return work()
    outcome, failure = None, None
    if is_first():
        try:
            outcome = {"value": work()}
        except ERRORS as e:
            failure = e
            kind = next(kind for kind in ERRORS if isinstance(e, kind))
            outcome = {"error": kind.__name__, "message": str(e)}
    # A collective operation on the devices may give up after minutes: wait in another way first.
    _wait(f"first-{next(_barriers)}", PATIENCE_SECONDS)
    sent = json.loads(_broadcast(json.dumps(outcome)))
    if failure is not None:
        raise failure
    if "error" in sent:
        raise next(kind for kind in ERRORS if kind.__name__ == sent["error"])(sent["message"])
    return outcome["value"] if is_first() else _tuples(sent["value"])


def agree(*numbers: int) -> tuple[int, ...]:
    """The largest value that any process gives for each number; all must call it together."""
    if count() == 1:
        return numbers
    gathered = multihost_utils.process_allgather(np.array(numbers, np.int32))  # [processes, n]
    return tuple(int(n) for n in gathered.max(axis=0))


def run(program: Callable[[], int]) -> int:
    """The exit status of `program`; a process that failed beside others ends here.

    An orderly end would wait for all processes. The others wait for this process at their next
    collective operation, and fail only once it is gone.
    """
    try:
        status = program()
    except Exception:
        if count() == 1:
            raise
        traceback.print_exc()
        status = 1
    if status and count() > 1:
        try:
            _wait("leave", FAREWELL_SECONDS)  # if all have failed, each prints its error
        except Exception as e:  # the end of the others has many forms
            logging.debug("left alone: %s", e)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _number(variable: str, given: int | None) -> int | None:
    text = os.environ.get(variable)
    return int(text) if given is None and text else given


def _wait(name: str, seconds: float) -> None:
    """Returns when every process has called this."""
    ocp.multihost.get_barrier_sync_fn()(key=f"mmrjax-{name}", timeout_ms=int(1000 * seconds))


def _broadcast(text: str) -> str:
    """The first process's text; the text of the others does not matter."""
    data = np.frombuffer(text.encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    data = data if is_first() else np.zeros(size, np.uint8)
    return multihost_utils.broadcast_one_to_all(data).tobytes().decode()


def _tuples(value):
    """JSON's lists as tuples, since configurations hold tuples."""
    if isinstance(value, dict):
        return {name: _tuples(content) for name, content in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
