"""The data that a run learns from, and the statistics of what it measures."""
