"""Leaves out, where an optional package is missing, the modules that cannot be imported without it."""

from __future__ import annotations

import os
import tempfile
from importlib.util import find_spec

_NEEDED = {
    "accelerate": "integrations/finetuning/*.py",
    "nni": "integrations/nni/*.py",
    "pytorch_lightning": "integrations/lightning/*.py",
    "tensorboard": "integrations/finetuning/*.py",
    "typer": "ss_pruning/cli/*.py",
    "ultralytics": "integrations/ultralytics/*.py",
}
collect_ignore_glob = [f"**/{files}" for name, files in _NEEDED.items() if not find_spec(name)]

# Ultralytics is to leave the settings of the user and the network alone. It reads these when it is imported.
os.environ["YOLO_CONFIG_DIR"] = tempfile.gettempdir()
os.environ |= {"YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false", "YOLO_VERBOSE": "false"}

if find_spec("hypothesis"):
    from hypothesis import HealthCheck, settings

    # Other work on the machine makes an example slow, and nothing wrong.
    settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("patient")
