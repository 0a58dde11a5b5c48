"""Two finished runs on the same images: by how much one is better, and how sure that is.

    python -m mmrjax.compare runs/embedded/patchcore/tile runs/random/patchcore/tile

Each argument is the folder of one method and category, with one folder per seed in it. It may also
be a work directory: all methods and categories that both work directories have are compared. The
runs may come from different teachers or settings, as long as their test images are the same. The
program prints the image metrics of the first, of the second, and the difference with its paired
95 % interval over groups of images. Metrics are averaged over seeds; each resample of groups serves
both runs.
"""

import argparse
import sys
from collections.abc import Sequence

from mmrjax.runs import arguments as arguments_lib
from mmrjax.runs import paired, places, staging
from mmrjax.runtime import command_line, files


def table(a: paired.Scores, b: paired.Scores) -> str:
    """Every image metric in percent, of all images and of each domain, as text."""
    domains = sorted({image[2] for image in a.images} - {""})
    width = max(16, *(len(domain) + 2 for domain in ("all", *domains)))
    row_format = f"{{:<{width}}}{{:<14}}{{:>8}}{{:>8}}{{:>12}}   {{}}"
    lines = [
        row_format.format("images", "metric", "first", "second", "difference", "95 % interval")
    ]
    for domain in ["all", *(domains if len(domains) > 1 else ())]:
        pair = (a, b) if domain == "all" else (a.of_domain(domain), b.of_domain(domain))
        if domain != "all" and len(set(pair[0].is_anomaly)) < 2:
            continue  # the metrics are undefined there
        for name, row in paired.difference(*pair).items():
            numbers = [f"{100 * row[side]:.1f}" for side in ("a", "b")]
            interval = (
                "–"
                if row["ci95"] is None
                else "{:+.1f} to {:+.1f}".format(*(100 * end for end in row["ci95"]))
            )
            gap = f"{100 * row['difference']:+.1f}"
            lines.append(row_format.format(domain, name, *numbers, gap, interval))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the comparison; 1 and one line on standard error if there is none."""
    arguments = arguments_lib.parse_compare(argv)
    return command_line.run(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    for title, *pair in _pairs(arguments.first, arguments.second):
        first, second = (_scores(place) for place in pair)
        print(f"{title}{table(first, second)}")
        print(f"seeds: {len(first.values)} and {len(second.values)}; images: {len(first.images)}")
    return 0


def _pairs(first: str, second: str) -> list[tuple[str, str, str]]:
    """(title, place, place) of what is compared: all that two work directories share.

    Raises:
      FileNotFoundError, ValueError: no runs, or none that belong together.
    """
    if files.is_remote(first) or files.is_remote(second):
        return [("", first, second)]
    a, b = places.groups(first), places.groups(second)
    if len(a) == len(b) == 1:
        return [("", *(str(next(iter(found.values()))) for found in (a, b)))]
    if not (shared := sorted(a.keys() & b.keys())):
        listed = " and ".join(", ".join("/".join(key) for key in sorted(found)) for found in (a, b))
        raise ValueError(f"no method and category is in both: {listed}; name <method>/<category>")
    return [(f"{'/'.join(key)}\n", str(a[key]), str(b[key])) for key in shared]


def _scores(place: str) -> paired.Scores:
    """The scores of all seeds in a folder or bucket."""
    with staging.opened(place, "/scores.csv") as stage:
        folder = stage.folder
        seeds = [path for path in sorted(folder.glob("seed*")) if files.is_run_name(path.name)]
        if not seeds:
            raise FileNotFoundError(
                f"no runs in {folder}; expected <workdir>/<method>/<category> with folders seed<k>"
            )
        return paired.read(seeds)


if __name__ == "__main__":
    sys.exit(main())
