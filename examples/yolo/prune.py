"""The road of a detector, end to end: train it, cut it, repair it, train on, export, run.

    python examples/yolo/prune.py --out runs/yolo_digits

Needs the extras `ultralytics`, `demo` and `onnx`. A YOLOv8n is trained from nothing (no weights are downloaded) on
digits pasted on photographs, see `digits_on_photos.py`; mAP is Ultralytics' own, on images that share neither digits
nor backgrounds with those trained on. Calibration images are training images without their labels.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("YOLO_OFFLINE", "true")

import torch
from ultralytics import YOLO

import ss_pruning
from ss_pruning.integrations.ultralytics import PrunedYOLO, calibration_images, prune_yolo, recover_yolo_

sys.path.insert(0, str(Path(__file__).parent))
from digits_on_photos import SIDE, write_data


class Road:
    """The stations, each measured as it is reached."""

    def __init__(self, out: Path, options: argparse.Namespace) -> None:
        self.out, self.options = out, options
        self.data = write_data(out / "data", options.training, options.validation, options.seed)
        self.result: dict[str, Any] = {
            "options": {k: v for k, v in vars(options).items() if k not in ("out", "earlier")}
        }
        self.result["stations"] = []
        # Written digits are no mirror images of each other.
        self.settings = {"data": str(self.data), "imgsz": SIDE, "workers": 0, "project": str(out.resolve())}
        self.settings |= {"single_cls": True} if options.one_class else {}
        self.training = {
            "batch": 8,
            "nbs": 8,  # a step of the optimiser for each batch
            "seed": options.seed,
            "fliplr": 0.0,
            "plots": False,
            "device": options.device,
        }

    def fit(self, yolo: YOLO, name: str, epochs: int, **options: Any) -> YOLO:
        """Train with labels, through Ultralytics."""
        close = {"close_mosaic": epochs // 3, "val": False, "exist_ok": True, "verbose": False}
        yolo.train(epochs=epochs, name=name, **{**self.settings, **self.training, **close, **options})
        return yolo

    def dense(self, name: str, yolo: YOLO, epochs: int, **options: Any) -> YOLO:
        """Train, or take what an earlier run has trained."""
        file = (self.options.earlier or Path()) / name / "weights" / "best.pt"
        if self.options.earlier is None or not file.exists():
            return self.fit(yolo, name, epochs, **options)
        return YOLO(file)

    def measure(self, name: str, yolo: YOLO, seconds: float) -> None:
        """Note mAP, and what it took to get here from the station before."""
        # Not padded (rect), so that ONNX, whose images have one size, sees the same.
        options = {"batch": 1, "rect": False, "device": self.options.device, "plots": False, "verbose": False}
        box = yolo.val(**self.settings, **options).box
        network = isinstance(yolo.model, torch.nn.Module)
        station = {"name": name, "map50_95": float(box.map), "map50": float(box.map50), "seconds": seconds}
        if network:
            station["params"] = sum(p.numel() for p in yolo.model.parameters())
        self.result["stations"].append(station)
        print(json.dumps(station), flush=True)
        (self.out / "results.json").write_text(json.dumps(self.result, indent=2) + "\n")

    def walk(self) -> None:
        """All of it."""
        options, started = self.options, time.time()
        dense = self.dense("dense", YOLO("yolov8n.yaml"), options.epochs)
        self.measure("dense", dense, time.time() - started)
        # What Ultralytics takes by default is for training from nothing, and undoes on few images what was recovered.
        tuning: dict[str, Any] = {"lr0": 1e-4, "optimizer": "AdamW", "warmup_epochs": 0.0}
        started = time.time()
        longer = YOLO(dense.overrides["model"])
        longer = self.dense("dense_longer", longer, options.tuning_epochs, **tuning)
        self.measure("dense, trained on as long as the pruned one", longer, time.time() - started)
        started = time.time()
        self.measure("cut", prune_yolo(dense, **self.budget("none"))[0], time.time() - started)
        started = time.time()
        small, report = prune_yolo(dense, **self.budget("reconstruct"))
        self.measure("cut and reconstructed", small, time.time() - started)
        self.result |= {
            "macs": report.macs_after / report.macs_before,
            "params": report.params_after / report.params_before,
            "max_error": report.max_error,
        }
        started = time.time()
        recover_yolo_(
            small,
            dense,
            str(self.data),
            steps=options.steps,
            settings=ss_pruning.Recovery(flip=False, batch=32, seed=options.draw),
        )
        self.measure("and recovered, without labels", small, time.time() - started)
        small.save(self.out / "recovered.pt")
        started = time.time()
        tuning["seed"] = options.draw
        tuned = self.fit(PrunedYOLO(self.out / "recovered.pt"), "pruned", options.tuning_epochs, **tuning)
        self.measure("and trained on, with labels", tuned, time.time() - started)
        tuned.save(self.out / "pruned.pt")
        file = tuned.export(format="onnx", imgsz=SIDE, simplify=False)
        self.measure("that as ONNX, in onnxruntime", YOLO(file, task="detect"), 0.0)
        again, _ = prune_yolo(tuned, **{**self.budget("reconstruct"), "macs": 0.8})
        self.measure("pruned again, to 0.8 of that", again, 0.0)

    def budget(self, compensation: str) -> dict[str, Any]:
        """How to prune."""
        images = calibration_images(self.data, SIDE, seed=self.options.draw)
        return {"macs": self.options.macs, "calibration": images, "compensation": compensation}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/yolo_digits"))
    parser.add_argument("--one-class", action="store_true", help="find digits, and do not tell them apart")
    parser.add_argument("--earlier", type=Path, help="folder of an earlier run, whose dense network is taken")
    parser.add_argument("--macs", type=float, default=0.6, help="share to keep")
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--tuning-epochs", type=int, default=6)
    parser.add_argument("--steps", type=int, default=100, help="of recovery")
    parser.add_argument("--training", type=int, default=320, help="images")
    parser.add_argument("--validation", type=int, default=128, help="images")
    parser.add_argument("--seed", type=int, default=0, help="of the data and the dense network")
    parser.add_argument("--draw", type=int, default=0, help="seed of all that comes after the dense network")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.manual_seed(options.seed + options.draw)
    Road(options.out, options).walk()


if __name__ == "__main__":
    main()
