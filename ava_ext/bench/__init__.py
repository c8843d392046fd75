"""`python -m ava_ext.bench`: your sizes, this library and its peers, on this machine. `ava_ext` does not import it."""
