"""Procedural images for the pretraining of the embedded teacher: no photograph, no outside data."""
