"""Converts industrial data sets to records: one TFDS builder per data set, without TensorFlow."""
