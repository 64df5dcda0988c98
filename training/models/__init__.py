"""The networks of a run, and how they are computed on one device or several."""
