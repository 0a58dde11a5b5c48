"""Renders the report of a work directory anew, without records or weights.

python -m mmrjax.report --workdir=<dir>
"""

import argparse
import sys
from collections.abc import Sequence

from mmrjax import methods
from mmrjax.report import page
from mmrjax.runs import staging
from mmrjax.runtime import command_line


def main(arguments: Sequence[str] | None = None) -> int:
    """Renders the report of a work directory anew."""
    parser = argparse.ArgumentParser(prog="python -m mmrjax.report", description=main.__doc__)
    parser.add_argument(
        "--workdir", required=True, type=staging.place, help="of results.json and its runs"
    )
    options = parser.parse_args(arguments)

    def render() -> int:
        with staging.opened(options.workdir) as stage:
            print(stage.named(str(page.write_report(stage.folder, methods.METHODS))))
        return 0

    return command_line.run(render)


if __name__ == "__main__":
    sys.exit(main())
