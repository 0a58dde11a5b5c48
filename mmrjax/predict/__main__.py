"""Scores images or a video: python -m mmrjax.predict --workdir=<run> --input=… --output=<dir>.

Images, folders (with all their sub-folders) and quoted globs may also stand without --input. A
video stands alone. Without --workdir the latest run in runs/ scores. The program writes into
--output

    scores.csv, scores.jsonl   path, score, threshold, verdict, p-value, boxes (x y w h in px)
    overlays/, heat/           pictures on one fixed colour scale, the same for every image
    maps/                      with --raw_maps=npy|tiff: float32 at the image's own size; for a
                               video maps/<video>/<frame>
    <video>_overlay.mp4        of a video (video.py); the scores of a video have a row per frame

A verdict needs a threshold (mmrjax/evaluate/calibrate.py). `--recalibrate=<folder>` takes the
threshold from other good images, such as of a new domain; `--target_fpr` chooses another
false-positive rate. Unreadable files are listed and skipped; the exit status is then 3.
"""

import argparse
import csv
import glob
import hashlib
import io
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterator, Sequence

import numpy as np
from absl import logging
from PIL import Image

from data_builders import files as image_folders
from data_builders.files import printable
from data_builders.folder import layout
from mmrjax.predict import video
from mmrjax.report import pictures
from mmrjax.runs import arguments as arguments_lib
from mmrjax.runs import detector as detector_lib
from mmrjax.runs import places
from mmrjax.runtime import command_line, files, logs

SOME_UNREADABLE = 3  # exit status
SHOWN = 20  # verdicts that are printed, image by image
MANY = 5  # images of which most are flagged, before the threshold is doubted
LONGEST_NAME = 240  # bytes of a file's name; 255, less .part


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    logs.setup()
    arguments = arguments_lib.parse_predict(argv)
    return command_line.run(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    check_output(arguments.output)
    given, films = arguments.images, [*filter(video.is_video, arguments.images)]
    if films and len(given) > 1:
        raise ValueError(f"{films[0]}: a video is scored alone; give it a call of its own")
    paths, root = ([], pathlib.Path()) if films or not given else find_all(given)
    place = places.run(arguments.workdir)
    if arguments.workdir is None:
        print(f"run: {place}")
    command_line.keep_compiled()
    # A single picture cannot be shared among cores.
    several = bool(films) or len(paths) > 1 or arguments.recalibrate is not None
    detector = detector_lib.load(place, show_cores=several)
    detector.full_scale = arguments.full_scale
    detector = choose_threshold(detector, arguments)
    if not given:
        return 0
    rows = []
    try:
        if films:
            unreadable = score_video(detector, arguments, rows)
        else:
            unreadable = score_images(detector, arguments, rows, paths, root)
    finally:  # an interrupted call writes the rows that it has
        if rows:
            write_scores(arguments.output, rows)
    print("\n".join([*verdicts(rows), summary(detector, rows, arguments.output)]))
    print(next_step(detector, rows, place))
    for line in unreadable:
        print(f"skipped: {printable(line)}", file=sys.stderr)
    unjudged = any(row["score"] is None for row in rows)
    return SOME_UNREADABLE if unreadable or unjudged else 0


def check_output(output: pathlib.Path) -> None:
    """Makes the folder and tries to write there, before hours of scoring are spent.

    Raises:
      OSError: the folder cannot be made or written to.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as e:
        raise OSError(f"--output={output}: no folder to write into ({e.strerror})") from e


def choose_threshold(
    detector: detector_lib.Detector, arguments: argparse.Namespace
) -> detector_lib.Detector:
    """The detector with the threshold of the command line.

    Raises:
      ValueError: the threshold is impossible, with the reason.
    """
    if arguments.calibration is not None:
        detector = detector.with_file(arguments.calibration)
    if arguments.recalibrate is not None:
        paths = good_images(arguments.recalibrate, detector.full_scale)
        source, groups = f"good images of {arguments.recalibrate}", list(paths.values())
        detector = detector.recalibrated(list(paths), source, groups)
        target = detector.target_fpr if arguments.target_fpr is None else arguments.target_fpr
        detector = detector.with_target(target)  # refused before an older file is replaced
        detector.calibration.write(arguments.output / "calibration.json")
        print(
            f"threshold {detector.thresholds[0]:.6g} from {len(set(groups))} good images\n"
            f"wrote {arguments.output / 'calibration.json'}"
        )
        return detector
    if arguments.target_fpr is not None:
        return detector.with_target(arguments.target_fpr)
    if arguments.calibration is not None and detector.thresholds[2]:
        raise ValueError(f"--calibration={arguments.calibration}: {detector.thresholds[2]}")
    if detector.thresholds[2]:
        logging.warning("scores only, no verdicts: %s", detector.thresholds[2])
    return detector


def find_images(given: str, flag: str = "--input") -> tuple[list[pathlib.Path], pathlib.Path]:
    """The image files of an argument, sorted, and the folder that their names are relative to.

    Raises:
      FileNotFoundError: there is no image.
    """
    path = pathlib.Path(given).expanduser()
    if path.is_dir():
        images, masks = layout.tell_masks_apart(path)
        paths, root = list(images), path
        if masks:
            logging.info("%d masks in %s are left out", len(masks), path)
    elif path.is_file():
        paths, root = [path], path.parent
    else:
        paths = sorted(pathlib.Path(p) for p in glob.glob(str(path), recursive=True))
        paths = [p for p in paths if p.is_file() and image_folders.is_image(p.name)]
        root = pathlib.Path(os.path.commonpath([p.parent for p in paths])) if paths else path
    if not paths:
        raise FileNotFoundError(
            f"{flag}={given}: no image there; expected a file, a folder or a quoted glob of "
            f"{', '.join(image_folders.images.SUFFIXES)}, or a video of {', '.join(video.SUFFIXES)}"
        )
    return paths, root


def find_all(given: Sequence[str]) -> tuple[list[pathlib.Path], pathlib.Path]:
    """As `find_images`, of several arguments; an image that is named twice counts once."""
    found = [find_images(one) for one in given]
    if len(found) == 1:
        return found[0]
    paths = {path.absolute(): path for some, _ in found for path in some}
    root = pathlib.Path(os.path.commonpath([root.absolute() for _, root in found]))
    return [*paths], root


def good_images(given: str, full_scale: int) -> dict[pathlib.Path, str]:
    """The images of --recalibrate that may be good, each with a hash of its pixels.

    Equal pixels are one part. Left out are, with a warning, images that the names of their folders
    or their masks call defective, and files that cannot be read.

    Raises:
      FileNotFoundError, ValueError: no image is left.
    """
    paths, root = find_images(given, "--recalibrate")
    if root.is_dir() and len(paths) > 1:
        try:
            bad = {i.path for i in layout.read_layout(root).items if i.defect != "good"}
        except ValueError:
            bad = set()  # its folders say nothing of good and defective
        if bad:
            logging.warning("%d images in %s are left out as defective", len(bad), given)
        paths = [path for path in paths if path not in bad]
    unreadable: list[str] = []
    hashes = {
        path: hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest()
        for path, image in readable(paths, full_scale, unreadable)
    }
    for line in unreadable:
        logging.warning("left out: %s", line)
    if not hashes:
        raise ValueError(f"--recalibrate={given}: no good image there that can be read")
    return hashes


def readable(
    paths: Sequence[pathlib.Path], full_scale: int, unreadable: list[str]
) -> Iterator[tuple[pathlib.Path, np.ndarray]]:
    """Yields (path, image) of each file; the errors of unreadable files join `unreadable`."""

    def read(path: pathlib.Path):
        try:
            return path, detector_lib.read_image(path, full_scale)
        except ValueError as e:
            return path, e

    for path, image in detector_lib.ahead(read, paths):
        if isinstance(image, ValueError):
            unreadable.append(str(image))
        else:
            yield path, image


def score_images(
    detector: detector_lib.Detector,
    arguments: argparse.Namespace,
    rows: list[dict],
    paths: Sequence[pathlib.Path],
    root: pathlib.Path,
) -> list[str]:
    """Adds a row per image to `rows` and writes its pictures, named after their places below root.

    Returns:
      A line per unreadable file.
    """
    unreadable = []
    if detector.scale is None:
        logging.warning("no pictures: the run was never evaluated, so it has no colour scale")
    if root.is_dir() and len(paths) > 1:
        unreadable += [line for line in image_folders.list_others(root) if ": " in line]
    items = readable(logs.progress(paths, "scoring"), detector.full_scale, unreadable)
    for path, image, prediction in detector.stream(items):
        name = path.absolute().relative_to(root.absolute())
        rows.append({"path": printable(name.as_posix()), **prediction.row()})
        if detector.scale and not arguments.no_pictures:
            write_pictures(arguments.output, name, image, prediction, detector.scale)
        if arguments.raw_maps:
            write_map(arguments.output / "maps" / name, prediction.map, arguments.raw_maps)
    if not rows:
        raise ValueError(f"none of {len(paths)} files could be read; the first: {unreadable[0]}")
    return unreadable


def score_video(
    detector: detector_lib.Detector, arguments: argparse.Namespace, rows: list[dict]
) -> list[str]:
    """Adds a row per frame to `rows` and writes the overlay; raw maps as maps/<video>/<frame>.

    Returns:
      A line if the video ends early.
    """
    path = pathlib.Path(arguments.images[0])

    def write_raw(number: int, prediction: detector_lib.Prediction) -> None:
        write_map(arguments.output / "maps" / path.name / f"{number:06d}", prediction.map, kind)

    kind, draws = arguments.raw_maps, not arguments.no_pictures
    return video.run(detector, path, arguments.output, rows, draws, write_raw if kind else None)


def write_pictures(
    output: pathlib.Path,
    name: pathlib.PurePath,
    image: np.ndarray,
    prediction: detector_lib.Prediction,
    scale: tuple[float, float],
) -> None:
    """Writes the overlay with its boxes, and the bare heat map."""
    heat, overlay = np.nan_to_num(prediction.map, nan=-np.inf), prediction.overlay(image)
    colour, _ = pictures.colour_and_opacity(pictures.scale_position(heat, scale))
    for folder, picture in (("overlays", overlay), ("heat", colour)):
        pictures.write_png(output / folder / short_name(name, ".png"), picture)


def short_name(name: pathlib.PurePath, ending: str) -> pathlib.PurePath:
    """A name with another ending; a name too long for a file system is cut, with its hash."""
    whole = os.fsencode(name.name)
    if len(whole) + len(ending) > LONGEST_NAME:
        digest = hashlib.sha256(whole).hexdigest()[:12]
        cut = whole[: LONGEST_NAME - len(ending) - len(digest) - 1]
        return name.with_name(f"{cut.decode(errors='ignore')}_{digest}{ending}")
    return name.with_name(name.name + ending)


def write_map(path: pathlib.Path, anomaly_map: np.ndarray, kind: str) -> None:
    """Writes a float32 map [h, w] as .npy or as a one-channel TIFF."""
    buffer = io.BytesIO()
    if kind == "npy":
        np.save(buffer, anomaly_map)
    else:
        Image.fromarray(anomaly_map).save(buffer, "TIFF")
    files.write_bytes(short_name(path, f".{kind}"), buffer.getvalue())


def write_scores(output: pathlib.Path, rows: Sequence[dict]) -> None:
    """Writes scores.csv and scores.jsonl; all rows have the columns of the first row."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(rows[0])
    for row in rows:
        cells = dict(row)
        cells["boxes"] = "; ".join(" ".join(map(str, box)) for box in row["boxes"] or ())
        writer.writerow(["" if cell is None else harmless(cell) for cell in cells.values()])
    files.write_text(output / "scores.csv", out.getvalue())
    files.write_text(output / "scores.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def harmless(cell: object) -> object:
    """A cell that no spreadsheet takes for a formula."""
    is_formula = isinstance(cell, str) and cell.startswith(("=", "+", "-", "@"))
    return f"'{cell}" if is_formula else cell


def summary(detector: detector_lib.Detector, rows: Sequence[dict], output: pathlib.Path) -> str:
    """The result in a line or two."""
    line = f"{len(rows)} scored"
    if unjudged := sum(row["score"] is None for row in rows):
        line += f", {unjudged} CANNOT BE JUDGED (the score is no finite number)"
    if detector.thresholds[0] is not None:
        flagged = sum(row["verdict"] == "anomaly" for row in rows)
        line += (
            f", {flagged} anomalous (score above {detector.thresholds[0]:.6g}; for parts like the "
            f"{len(detector.calibration.ids)} {detector.calibration.source}: "
            f"{detector.calibration.promise(detector.target_fpr)})"
        )
    return f"{line}\nwrote {output}"


def verdicts(rows: Sequence[dict]) -> list[str]:
    """A line for each of up to SHOWN images: verdict, score, p-value, name; nothing of a video."""
    if "frame" in rows[0] or len(rows) > SHOWN:
        return []
    lines = []
    for row in rows:
        p_value = "" if row["p_value"] is None else f"  p {row['p_value']:.3f}"
        if row["score"] is None:
            lines.append(f"{row['verdict']:12} {row['path']}")
            continue
        verdict = row["verdict"] or "no verdict"
        lines.append(f"{verdict:11} score {row['score']:.6g}{p_value}  {row['path']}")
    return lines


def next_step(detector: detector_lib.Detector, rows: Sequence[dict], place: str) -> str:
    """The command that helps most from here."""
    again = f"mmrjax predict <images> --workdir={place} --recalibrate=<folder of good pictures>"
    if detector.thresholds[0] is None:
        return f"next, for verdicts: {again}"
    flagged = sum(row["verdict"] == "anomaly" for row in rows)
    if len(rows) >= MANY and flagged > len(rows) / 2:
        return (
            "next: more than half are called defective; if they are good, light, background or "
            f"view is not that of the training: {again}"
        )
    return f"next, a file for the line: mmrjax export {place} --output=scorer.onnx"


if __name__ == "__main__":
    sys.exit(main())
