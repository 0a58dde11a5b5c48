"""RSDDs (Gan et al., 2017): 195 strips of rail surface in two types, every one with a defect."""
