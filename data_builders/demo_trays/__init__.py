"""Trays of sixteen drawn blades at 1024 px: 4 good ones to train on, 28 to test, defects tiny."""
