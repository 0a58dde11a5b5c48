"""The records and weights that a configuration needs: found, missed, built, loaded."""

import contextlib
from collections.abc import Callable, Collection, Iterable, Sequence

from absl import logging
from ml_collections import ConfigDict
from PIL import Image

from data_builders import build, images
from data_builders.folder import folder_dataset_builder, layout
from mmrjax import methods
from mmrjax.data import records as records_lib
from mmrjax.data import splits, tracks
from mmrjax.methods import auto
from mmrjax.runs import pretrained
from mmrjax.runtime import files, processes

AUTO = "auto"  # method.names that leave the choice to the program
SEEN = 50  # pictures whose size is looked at
DEMO = "to see the program without them: python -m mmrjax.main --config=configs/demo.py"


class Missing(FileNotFoundError):
    """Several things that a run needs are not there; `lines` say which, and what to do."""

    def __init__(self, things: Sequence[str]):
        """Takes a sentence for each thing."""
        super().__init__("; ".join(things))
        numbered = [f"  {i}. {' '.join(text.split())}" for i, text in enumerate(things, 1)]
        head = f"error: {len(things)} things are missing, nothing was begun:"
        self.lines = [head, *numbered, f"  {DEMO}"]


def choose(config: ConfigDict, given: Collection[str]) -> None:
    """Replaces method.names=auto, in place, by what the raw pictures suggest (methods/auto.py).

    Args:
      config: the configuration of a call; unchanged if it names its methods.
      given: fields of the command line, which stay as they are.

    Raises:
      FileNotFoundError, ValueError: no raw pictures to choose by.
    """
    if tuple(config.method.names) != (AUTO,):
        return
    count, sizes = _pictures(config)
    choice = auto.choose(count, sizes)
    config.method.names = choice.names
    changed = {name: value for name, value in choice.fields.items() if name not in given}
    config.update_from_flattened_dict(changed)
    logging.info("chosen: %s", choice.reason)


def _pictures(config: ConfigDict) -> tuple[int, list[tuple[int, int]]]:
    """(good training pictures of the smallest category, (height, width) of up to SEEN of each)."""
    data = config.data
    root, in_raw, wanted = build.at_hand(
        data.name, data.raw_dir or None, data.data_dir, list(data.categories) or None
    )
    builder = build.load_builder(data.name)
    if root is None or not in_raw or not issubclass(builder, folder_dataset_builder.Builder):
        raise ValueError(
            f"--config.method.names={AUTO}: chooses by the pictures of a folder of your own "
            "(--config.data.raw_dir=…); name a method for other data"
        )
    counts, sizes = [], []
    for category in wanted:
        found = layout.read_layout(builder.category_folders(root)[category], builder.CHOICE)
        paths = [
            item.path for item in found.items if item.split == "train" and item.defect == "good"
        ]
        counts.append(len(paths))
        for path in paths[:SEEN]:
            with (
                contextlib.suppress(OSError, SyntaxError, ValueError),  # the build names the file
                Image.open(path, formats=images.FORMATS) as picture,
            ):
                sizes.append(picture.size[::-1])
    return min(counts), sizes


def check_needs(configs: Iterable[ConfigDict], weights: bool = True) -> None:
    """Looks for everything that runs need, before anything is built; fetches published weights.

    Args:
      configs: configurations of one run or more; shared data are looked for once.
      weights: whether to look for weight files; finished runs need none.

    Raises:
      FileNotFoundError, ValueError: the one thing that is missing, with what to do.
      Missing: several things are.
    """
    missing: dict[str, Exception] = {}
    calls: dict[str, Callable[[], object]] = {}  # what several runs share is looked for once
    for config in configs:
        for error in _look_for_data(config):
            missing.setdefault(str(error), error)
        for name in config.method.names if weights else ():
            calls |= methods.METHODS[name].weights_needed(config)
    for find in calls.values():
        try:
            pretrained.found(find)
        except (FileNotFoundError, ValueError) as e:
            missing.setdefault(str(e), e)
    if len(missing) == 1:
        raise next(iter(missing.values()))
    if missing:
        raise Missing(list(missing))


def _look_for_data(config: ConfigDict) -> list[Exception]:
    """The errors of building the records of a configuration, found without building any."""
    data, errors = config.data, []
    if files.is_remote(data.data_dir):  # looked for when they are fetched
        return []
    wanted = [(data.name, data.raw_dir, list(data.categories) or None, "data.raw_dir")]
    if data.join:  # a data set without a folder is left out
        given = [(*entry.partition("/")[::2], config.raw_dirs) for entry in data.join]
        wanted = [
            (name, folders.get(name, ""), [category] if category else None, f"raw_dirs.{name}")
            for name, category, folders in given
            if folders.get(name, "")
        ]
    for name, raw_dir, categories, field in wanted:
        try:
            build.at_hand(name, raw_dir or None, data.data_dir, categories)
        except FileNotFoundError as e:
            errors.append(FileNotFoundError(f"{e} (here: --config.{field}=…)"))
    return errors


def load_records(config: ConfigDict) -> Iterable[records_lib.Records]:
    """The records of each category, or of all together; builds what is missing or stale."""
    directories = processes.first(lambda: build_records(config))
    if files.is_remote(config.data.data_dir) and not processes.is_first():
        directories = build.fetch(config.data.name, config.data.data_dir, [*directories])
    parts = map(records_lib.load, directories.values())
    if config.data.join:
        return [tracks.joined(list(parts), config.data.held_out)]
    return splits.units(parts, config.data.protocol)


def build_records(config: ConfigDict) -> dict[str, str]:
    """Builds what is missing or stale: {category or, of joined ones, part: its records' folder}."""
    data = config.data
    if data.join:
        return _build_joined(config)
    try:
        directories = build.build(
            data.name,
            data.raw_dir or None,
            data.data_dir,
            list(data.categories) or None,
            choice={kind: data[kind] for kind in ("good", "bad", "masks")},
        )
    except FileNotFoundError as e:
        raise FileNotFoundError(f"{e} (here: --config.data.raw_dir=…)") from e
    return {category: str(directory) for category, directory in directories.items()}


def _build_joined(config: ConfigDict) -> dict[str, str]:
    """The records of data.join: {"<dataset>/<category>": folder}; what is not given is left out.

    Raises:
      FileNotFoundError: a folder that is given holds no data set, or none is given.
      ValueError: data.join names what is none, or a category twice.
    """
    found, left_out = {}, []
    for entry in config.data.join:
        name, _, category = entry.partition("/")
        procedural = build.load_builder(name).PROCEDURAL
        raw_dir = config.raw_dirs.get(name, "")
        if not raw_dir and not procedural:
            left_out.append(name)
            continue
        try:
            directories = build.build(
                name, raw_dir or None, config.data.data_dir, [category] if category else None
            )
        except FileNotFoundError as e:
            raise FileNotFoundError(f"{e} (here: --config.raw_dirs.{name}=…)") from e
        for category, directory in directories.items():
            part = f"{name}/{category}"
            if part in found:
                raise ValueError(f"--config.data.join={config.data.join}: {part} comes twice")
            found[part] = str(directory)
    hint = ", ".join(f"--config.raw_dirs.{name}=…" for name in dict.fromkeys(left_out))
    if not found:
        raise FileNotFoundError(f"none of the data sets of data.join is at hand; give {hint}")
    if left_out:
        logging.warning("left out for want of a folder: %s (%s)", ", ".join(left_out), hint)
    logging.info("data sets: %s", ", ".join(found))
    return found
