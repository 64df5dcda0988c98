"""Runs `alignd` as `python -m deploy.cli`, which is how its processes start each other."""

from deploy.cli.main import main

main()
