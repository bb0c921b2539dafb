"""From a data set's name to batches: sources open it, splits divide it, and data paths make batches of it.

`sources` and `folders` open a data set, `columns` finds images and labels of a split, `decoding` makes pictures, and
`splits` divides them into training, validation and test, as `settings` say. Small images lie decoded in memory
(`in_memory`), large ones are read as they are needed (`large_images`), or come in as a stream (`streams`). May import
`harness.cli`, `harness.errors` and `harness.launch` alone.
"""
