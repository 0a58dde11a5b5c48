"""Renders the report of a work directory again, without JAX, records or weights.

python -m mmrjax.report --workdir=<dir>
"""

import argparse
import sys
from collections.abc import Sequence

from mmrjax.report import page
from mmrjax.runtime import command_line, staging


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: renders the report of a work directory again."""
    parser = argparse.ArgumentParser(prog="python -m mmrjax.report", description=main.__doc__)
    parser.add_argument(
        "--workdir", required=True, type=staging.place, help="of results.json and its runs"
    )
    options = parser.parse_args(arguments)

    def render() -> int:
        with staging.opened(options.workdir) as workdir:
            print(staging.named(str(page.write_report(workdir))))
        return 0

    return command_line.run(render)


if __name__ == "__main__":
    sys.exit(main())
