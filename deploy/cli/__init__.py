"""The `alignd` command: a module for each group of verbs."""
