"""A small real detection set, with boxes known by construction: handwritten digits on photographs.

    python examples/yolo/digits_on_photos.py digits

Digits are scans of scikit-learn's (8 x 8), photographs its two sample images. Training and validation share neither:
the digits of the one come before those of the other in the file, its backgrounds from the left of the photographs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

SIDE = 160
TRAINING_DIGITS = 1200
TRAINING_COLUMNS = 0.6


def write_data(root: Path, training: int = 320, validation: int = 96, seed: int = 0) -> Path:
    """Write images and labels as Ultralytics reads them; returns the data.yaml."""
    for split, count in (("train", training), ("val", validation)):
        images, labels = root / "images" / split, root / "labels" / split
        images.mkdir(parents=True, exist_ok=True)
        labels.mkdir(parents=True, exist_ok=True)
        for i, (pixels, boxes) in enumerate(scenes(split, count, seed)):
            Image.fromarray(pixels).save(images / f"{i:04}.png")
            lines = [" ".join([str(label), *(f"{x:.6f}" for x in box)]) for label, box in boxes]
            (labels / f"{i:04}.txt").write_text("\n".join(lines) + "\n")
    data = root / "data.yaml"
    names = "".join(f'  {i}: "{i}"\n' for i in range(10))
    data.write_text(f"path: {root.resolve()}\ntrain: images/train\nval: images/val\nnames:\n{names}")
    return data


Boxes = list[tuple[int, tuple[float, float, float, float]]]


def scenes(split: str, count: int, seed: int) -> Iterator[tuple[np.ndarray, Boxes]]:
    """Images [side, side, 3], each with its labels and boxes (middle, width, height, as shares of the side)."""
    random = np.random.default_rng([seed, split == "val"])
    digits = load_digits()
    chosen = slice(TRAINING_DIGITS) if split == "train" else slice(TRAINING_DIGITS, None)
    scans, labels = digits.images[chosen] / 16, digits.target[chosen]
    photos = [_part(photo, split) for photo in load_sample_images().images]
    for _ in range(count):
        scene = _background(photos[random.integers(len(photos))], random)
        boxes: Boxes = []
        taken = np.zeros((SIDE, SIDE), dtype=bool)
        for i in random.integers(len(scans), size=random.integers(3, 8)):
            box = _paste(scene, taken, scans[i], random)
            boxes += [] if box is None else [(int(labels[i]), box)]
        yield scene.round().clip(0, 255).astype(np.uint8), boxes


def _part(photo: np.ndarray, split: str) -> np.ndarray:
    end = round(TRAINING_COLUMNS * photo.shape[1])
    return photo[:, :end] if split == "train" else photo[:, end:]


def _background(photo: np.ndarray, random: np.random.Generator) -> np.ndarray:
    side = random.integers(SIDE // 2, min(photo.shape[:2]))
    top, left = (random.integers(length - side + 1) for length in photo.shape[:2])
    crop = Image.fromarray(photo[top : top + side, left : left + side]).resize(
        (SIDE, SIDE), Image.Resampling.BILINEAR
    )
    return np.asarray(crop, dtype=float)


def _paste(
    scene: np.ndarray, taken: np.ndarray, scan: np.ndarray, random: np.random.Generator
) -> tuple[float, float, float, float] | None:
    """Write a digit where there is none yet; its box, or None where there was no room."""
    side = int(random.integers(24, 57))
    ink = np.asarray(
        Image.fromarray(scan.astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC)
    ).clip(0, 1)
    top, left = random.integers(SIDE - side + 1, size=2)
    place = np.s_[top : top + side, left : left + side]
    if taken[place].any():
        return None
    taken[place] = True
    dark = scene[place].mean() > 128
    color = random.integers(0, 90, size=3) + (0 if dark else 166)
    scene[place] += ink[..., None] * (color - scene[place])
    rows, columns = (np.flatnonzero((ink > 0.25).any(axis)) for axis in (1, 0))
    y0, y1, x0, x1 = top + rows[0], top + rows[-1] + 1, left + columns[0], left + columns[-1] + 1
    return (x0 + x1) / 2 / SIDE, (y0 + y1) / 2 / SIDE, (x1 - x0) / SIDE, (y1 - y0) / SIDE


if __name__ == "__main__":
    print(write_data(Path(sys.argv[1])))
