"""Everything that knows no picture: configuration, files, devices, checkpoints, logs."""
