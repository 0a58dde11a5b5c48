"""Scores images and videos with a trained run: python -m mmrjax.predict."""
