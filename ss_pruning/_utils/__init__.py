"""What every package uses and none is about: running a model so that nothing of it stays, copies, files, progress."""
