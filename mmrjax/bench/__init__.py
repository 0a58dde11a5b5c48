"""Speed and memory, beside the official code's model: python -m mmrjax.bench."""
