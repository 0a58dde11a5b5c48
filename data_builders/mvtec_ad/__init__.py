"""MVTec AD (Bergmann et al., 2021): 15 categories of objects and textures."""
