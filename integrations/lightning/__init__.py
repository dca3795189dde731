"""PyTorch Lightning: a callback that trains sparse and prunes."""
