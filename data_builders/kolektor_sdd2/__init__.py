"""KolektorSDD2 (Božič et al., 2021): 3,335 colour images of one surface, most of them good."""
