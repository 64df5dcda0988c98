"""A run's files on disk, and the trainer's side of operators and serving."""
