"""What the scripts are made of: command line, data, training loop, run folder, pictures, and what is published.

May import timm_sd, but neither `paper` nor `timing` nor a script.
"""
