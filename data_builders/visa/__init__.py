"""VisA (Zou et al., ECCV 2022): 10,821 colour images of twelve objects."""
