"""AeBAD (Zhang et al., 2023): aero-engine blades under domain shift, images (s) and videos (v)."""
