"""Log lines and progress for a person, on a terminal or as plain lines; and metrics.jsonl."""

import contextlib
import json
import logging as std_logging
import os
import pathlib
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized

import jax
import tqdm
from absl import flags, logging

from mmrjax.runtime import files, processes
from mmrjax.runtime import trackers as trackers_lib

LINE_SECONDS = 15.0  # between plain lines when there is no terminal
WAIT_SECONDS = 2.0  # of silence, after which a wait says what it is
FLUSH_SECONDS = 1.0  # between fetches of the losses from the device
# Our packages: an environment may lie in a clone that is called mmrjax.
_ROOT = pathlib.Path(__file__).parents[2]
OURS = tuple(str(_ROOT / name) + os.sep for name in ("mmrjax", "data_builders", "scripts"))


def setup() -> None:
    """Shows our own log lines, warnings of libraries, and nothing of Orbax.

    Orbax logs 40 lines per save, and after a failure the stack of every thread and task, beside the
    error that it raises.
    """
    flags.FLAGS.mark_as_parsed()  # nothing here has absl flags, but absl and Grain look for them
    logging.set_verbosity(logging.INFO)
    logging.use_absl_handler()
    handler = logging.get_absl_handler()
    handler.setFormatter(std_logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    handler.addFilter(_is_for_people)
    if not isinstance(sys.unraisablehook, _QuietOrbax):
        sys.unraisablehook = _QuietOrbax(sys.unraisablehook)


def _is_for_people(record: std_logging.LogRecord) -> bool:
    if record.pathname.startswith(OURS):
        return True
    is_orbax = any(name in record.pathname for name in ("orbax", "asyncio"))
    return record.levelno >= logging.converter.STANDARD_WARNING and not is_orbax


class _QuietOrbax:
    """Drops the noise of a failed save of Orbax: errors of dozens of writers without a loop."""

    def __init__(self, other: Callable):
        """`other` is the hook for all other errors."""
        self._other = other

    def __call__(self, unraisable) -> None:
        """Takes an error, as `sys.unraisablehook` does."""
        if str(unraisable.exc_value) != "Event loop is closed":
            self._other(unraisable)


def on_terminal() -> bool:
    """Whether standard error is a terminal and this is the first process."""
    return sys.stderr.isatty() and processes.is_first()


def progress(items: Iterable, label: str, total: int | None = None) -> Iterator:
    """Iterates with a bar on a terminal, or with a plain line every LINE_SECONDS elsewhere."""
    total = len(items) if total is None and isinstance(items, Sized) else total
    if on_terminal():
        yield from tqdm.tqdm(items, desc=label, total=total, leave=False)
        return
    started = last_line = time.monotonic()
    for done, item in enumerate(items):
        if time.monotonic() - last_line >= LINE_SECONDS:
            last_line = time.monotonic()
            left = (last_line - started) / done * (total - done) if done and total else None
            rest = "" if left is None else f", {tqdm.tqdm.format_interval(left)} left"
            logging.info("%s %d/%s%s", label, done, total or "?", rest)
        yield item


@contextlib.contextmanager
def waiting(label: str) -> Iterator[None]:
    """Tells of a wait over WAIT_SECONDS: on a terminal by the second, and a line in the log.

    Args:
      label: what is waited for, such as "compiling the training step".
    """
    started, done = time.monotonic(), threading.Event()

    def tell() -> None:
        if done.wait(WAIT_SECONDS):
            return
        if not on_terminal():
            logging.info("%s …", label)
            return
        while not done.wait(0.5):
            print(f"\r{label}, {time.monotonic() - started:.0f} s ", end="", file=sys.stderr)
        print("\r" + " " * (len(label) + 12), end="\r", file=sys.stderr)

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        done.set()
        teller.join()
        if (took := time.monotonic() - started) >= WAIT_SECONDS:
            logging.info("%s took %.0f s", label, took)


def remedy(rate_field: str) -> str:
    """The advice for a loss or a parameter that is not finite."""
    return f"lower {rate_field} or use train.compute_dtype=float32, in another --workdir"


class TrainLog:
    """Losses of a training run: fetched in groups, written to metrics.jsonl, shown as progress.

    Every process fetches them, and so notices a loss that is not finite; the first process writes.
    """

    def __init__(
        self,
        path: pathlib.Path,
        start: int,
        stop: int,
        steps_per_epoch: int,
        batch: int,
        rate_field: str = "optim.learning_rate",
        trackers: Sequence[trackers_lib.Tracker] = (),
        first: tuple[int, int] = (0, 0),
    ):
        """Opens `path`, drops what it holds from step `start` on, and starts the clock.

        `first` are the steps and the epochs of earlier stages, which stand in `path` before those
        of this stage.
        """
        self._remedy, self._trackers = remedy(rate_field), trackers
        self._first, self._first_epoch = first
        processes.first(lambda: self._begin(path, first[0] + start))
        self._file = (path if processes.is_first() else pathlib.Path(os.devnull)).open("a")
        self._stop, self._steps_per_epoch, self._batch = stop, steps_per_epoch, batch
        self._pending: list[tuple[int, dict]] = []
        self._step, self._last_flush, self._last_line = start, time.monotonic(), time.monotonic()
        self._bar = tqdm.tqdm(
            total=stop, initial=start, unit="step", desc="training", disable=not on_terminal()
        )

    def _begin(self, path: pathlib.Path, start: int) -> None:
        lines = _lines_before(path, start)
        for tracker in self._trackers:
            tracker.replay(lines)

    def add(self, step: int, values: dict[str, jax.Array]) -> None:
        """Takes the logs of steps [step, step + k), device arrays [k]."""
        self._pending.append((step, values))
        if len(self._pending) > 1:
            # Dispatch is asynchronous: without this the loop would run hundreds of steps ahead,
            # deaf to SIGTERM and to the clock of checkpoints.
            jax.block_until_ready(self._pending[-2])

    def restart(self) -> None:
        """Starts the clock anew, so that rates leave out the time of compiling."""
        self._last_flush = self._last_line = time.monotonic()

    def is_due(self) -> bool:
        """Whether it is time to `flush`."""
        return time.monotonic() - self._last_flush >= FLUSH_SECONDS

    def flush(self) -> None:
        """Fetches and writes what is pending.

        Raises:
          FloatingPointError: a loss is not finite, naming the first such step.
        """
        if not self._pending:
            return
        first, pending, self._pending = self._step, jax.device_get(self._pending), []
        now = time.monotonic()
        done = sum(len(values["loss"]) for _, values in pending)
        rate = done * self._batch / max(now - self._last_flush, 1e-9)
        self._last_flush = now
        for step, values in pending:
            for i in range(len(values["loss"])):
                line = {
                    "step": self._first + step + i,
                    "epoch": self._first_epoch + (step + i) // self._steps_per_epoch,
                }
                line |= {name: float(value[i]) for name, value in values.items()}
                line |= {"images_per_second": round(rate, 2), "time": round(time.time(), 2)}
                self._file.write(json.dumps(line) + "\n")
                for tracker in self._trackers:
                    tracker.add(line)
                if not abs(line["loss"]) < float("inf"):
                    self._file.flush()
                    begin = self._first + first
                    raise FloatingPointError(
                        f"the loss is {line['loss']} at step {line['step']} (steps {begin} to "
                        f"{begin + done - 1} were checked together); {self._remedy}"
                    )
        self._file.flush()
        for tracker in self._trackers:
            tracker.flush()
        self._step = first + done
        self._show(line["loss"], rate, done, now)

    def _show(self, loss: float, rate: float, done: int, now: float) -> None:
        self._bar.update(done)
        self._bar.set_postfix_str(f"loss {loss:.4f}, {rate:.1f} img/s")
        due = now - self._last_line >= LINE_SECONDS or self._step >= self._stop
        if self._bar.disable and due:
            self._last_line = now
            left = (self._stop - self._step) * self._batch / max(rate, 1e-9)
            logging.info(
                "step %d/%d, epoch %d, loss %.4f, %.1f img/s, %s left",
                self._step,
                self._stop,
                (self._step - 1) // self._steps_per_epoch,
                loss,
                rate,
                tqdm.tqdm.format_interval(left),
            )

    def __enter__(self):
        """Returns itself."""
        return self

    def __exit__(self, *exception):
        """Closes bar and file."""
        self._bar.close()
        self._file.close()


def seconds(path: pathlib.Path, batch: int, start: int, stop: int) -> float | None:
    """Time spent in the steps [start, stop) that `path` holds, over all calls of a run.

    None if the file is lost.
    """
    if not path.is_file():
        return None
    lines = [line for line in map(_parse, path.read_text().splitlines()) if line]
    rates = [
        line["images_per_second"]
        for line in lines
        if start <= line["step"] < stop and "images_per_second" in line
    ]
    return sum(batch / rate for rate in rates)


def _lines_before(path: pathlib.Path, step: int) -> list[dict]:
    """Drops the lines from `step` on; replaces the file, so that a kill keeps the history."""
    lines = map(_parse, path.read_text().splitlines()) if path.exists() else ()
    lines = [line for line in lines if line and line["step"] < step]
    files.write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
    return lines


def _parse(line: str) -> dict | None:
    try:
        content = json.loads(line)
    except json.JSONDecodeError:
        return None  # the last line of a killed run may be cut short
    return content if isinstance(content, dict) and "step" in content else None
