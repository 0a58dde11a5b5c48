"""Speed and memory of a method, alone or side by side with PyTorch: python -m mmrjax.bench."""
