"""BTAD (Mishra et al., ISIE 2021): 2,540 colour images of three industrial products."""
