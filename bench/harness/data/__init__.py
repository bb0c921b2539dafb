"""From a data set's name to batches: sources open it, splits divide it, and two data paths make batches of it.

Small images lie decoded in memory (`in_memory`); large ones are read as they are needed (`large_images`). May import
`harness.cli` and `harness.errors` alone.
"""
