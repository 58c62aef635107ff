"""Measured configurations: where they are looked up, and the search that finds them."""
