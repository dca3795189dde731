"""NNI's masks on a timm model: filters of every convolution, timm's own subclasses included, then a smaller model.

python examples/nni/timm_model.py                        # random weights: shows sizes
python examples/nni/timm_model.py resnet18 --weights resnet18.safetensors --ratio 0.3

Needs NNI and timm: pip install 'ss-pruning[cli,nni,timm]'
"""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from timm.data import resolve_model_data_config

from ss_pruning.integrations.nni.pruner import SynapticStrengthPruner, bake, compact
from ss_pruning.sources.models import build_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="tf_efficientnet_lite0", help="name of a timm model")
    parser.add_argument("--weights", help="safetensors or .pth file with the trained weights")
    parser.add_argument("--ratio", type=float, default=0.5, help="share of the filters to mask")
    chosen = parser.parse_args()
    torch.manual_seed(0)
    model = build_model(f"timm:{chosen.model}", chosen.weights)
    images = torch.randn(2, *resolve_model_data_config(model)["input_size"])

    # "Conv2d" means its subclasses too here: Conv2dSame, for one, which NNI's own pruners pass over.
    config_list = [{"op_types": ["Conv2d"], "sparse_ratio": chosen.ratio, "granularity": "out_channel"}]
    pruner = SynapticStrengthPruner(model, config_list, images)
    _, masks = pruner.compress()
    pruner.unwrap_model()  # gives back the unmasked weights: `compact` bakes the masks in

    console = Console()
    for norms in ("keep", "mask"):
        small, report = compact(model, masks, images, norms=norms)
        console.print(f'\nnorms="{norms}"')
        console.print(report.table())
        with torch.no_grad():
            masked = bake(model, masks, images, norms=norms).eval()(images)
            difference = (small.eval()(images) - masked).abs().max() / masked.abs().max()
        print(f"largest difference to the masked model, in single precision: {difference:.0e}")
        for left in report.excluded:
            print(f"stays: {left.channels} channels ({left.reason})")


if __name__ == "__main__":
    main()
