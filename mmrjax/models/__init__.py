"""Networks in flax.linen: arrays in, named features out. No training, no files, no NCHW here."""
