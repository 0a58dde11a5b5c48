"""mmrjax: industrial anomaly detection in JAX; trains on good parts, finds and locates defects."""
