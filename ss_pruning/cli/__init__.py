"""The command line, `ss-prune`."""
