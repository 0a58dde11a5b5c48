"""The one training loop and its jitted step."""
