"""Experiment configurations: `common.py` holds every field, one file per data set changes some."""
