"""`python -m ss_pruning.cli` is `ss-prune`."""

from ss_pruning.cli.app import app

app()
