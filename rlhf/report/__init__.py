"""One HTML page for a run; see `__main__`."""
