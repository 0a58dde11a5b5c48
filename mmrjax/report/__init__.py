"""The page of a work directory: python -m mmrjax.report."""
