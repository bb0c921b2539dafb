"""The paper re-run: its numbers, the trainings that its tables and figures take, and the report of what was run.

May import `harness` and timm_sd, but neither `timing` nor a script.
"""
