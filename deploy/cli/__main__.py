"""`python -m deploy.cli`, as processes of alignd start one another."""

from deploy.cli.main import main

main()
