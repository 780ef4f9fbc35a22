"""What the scripts at the top level share: run folders, devices, embeddings, model folders, caches, the command line.

Nothing in here knows the algorithm, a game or each other's insides.
"""
