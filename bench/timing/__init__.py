"""What stochastic depth saves: contestants that take turns, whole epochs timed from outside, and their pictures.

May import `harness` and timm_sd, but neither `paper` nor a script.
"""
