"""Synthetic and labelled defects for training: python -m mmrjax.data.defects."""
