"""What a run leaves on disk, and how operators and serving reach it."""
