"""One file to deploy: python -m mmrjax.export."""
