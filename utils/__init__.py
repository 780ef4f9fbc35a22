"""What the scripts at the top level share: run folders, devices, embeddings, model folders, caches, the command line.

Nothing in here knows the algorithm's functions or a game; `runs` knows the names of some flags and metrics.
"""
