"""Sparse autoencoders: the modules, their files, and finding them in a package, a folder or on the Hub."""
