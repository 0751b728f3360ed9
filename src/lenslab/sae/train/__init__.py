"""Train sparse autoencoders: build one, choose a source of vectors, train."""
