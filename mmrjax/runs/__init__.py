"""Runs on disk: where they lie, what they hold, how they are restored and compared."""
