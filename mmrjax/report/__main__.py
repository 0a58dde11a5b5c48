"""Renders the report of a work directory anew, without records or weights.

python -m mmrjax.report --workdir=<dir>
"""

import sys
from collections.abc import Sequence

from mmrjax import methods
from mmrjax.report import page
from mmrjax.runs import arguments as arguments_lib
from mmrjax.runs import places, staging
from mmrjax.runtime import command_line


def main(arguments: Sequence[str] | None = None) -> int:
    """Renders the report of a work directory anew."""
    options = arguments_lib.parse_report(arguments)

    def render() -> int:
        with staging.opened(places.workdir(options.workdir)) as stage:
            print(stage.named(str(page.write_report(stage.folder, methods.METHODS))))
        return 0

    return command_line.run(render)


if __name__ == "__main__":
    sys.exit(main())
