"""Scores, metrics, pictures and thresholds of a trained run."""
