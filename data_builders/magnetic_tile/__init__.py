"""Magnetic tile defects (Huang et al., 2020): 1344 grey images of about 200 tiles."""
