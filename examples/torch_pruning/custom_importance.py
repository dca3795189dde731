"""Your own importance on top of synaptic shares: how much entropy do the consumers of a channel lose with it?

python examples/torch_pruning/custom_importance.py  # the demo network at 60, 50 and 40 % of its MACs
python examples/torch_pruning/custom_importance.py --macs 0.3

An output of variance V keeps V (1 - share) without one of its inputs: the entropy of a Gaussian falls by
-0.5 ln(1 - share). Summed over all that read a channel, this is its score. Shares that are small count as half of
themselves; one near 1, an output that hangs on a single input, counts for much more than it does in a sum of shares.

The class works in every pruner of Torch-Pruning too. Needs scikit-learn: pip install 'ss-pruning[cli,demo]'
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
import torch_pruning as tp
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor, nn

import ss_pruning
from ss_pruning.importance.strength import by_input_channel
from ss_pruning.sources.demo import digits_data, digits_resnet, digits_weights

READS = (tp.prune_conv_in_channels, tp.prune_linear_in_channels)


class EntropyLost(tp.importance.Importance):
    """Nats of entropy that all consumers of a channel lose with it.

    Args:
        model: The model to prune; strengths are taken once, from its weights as they are.
        example_inputs: What its `forward` takes.
    """

    def __init__(self, model: nn.Module, example_inputs: Tensor) -> None:
        self.lost: dict[nn.Module, Tensor] = {}
        shares = ss_pruning.synaptic_strength(model, example_inputs, statistics="gaussian").shares()
        for path, share in shares.items():
            module = model.get_submodule(path)
            nats = -0.5 * torch.log1p(-share.clamp(max=1 - 1e-6))
            self.lost[module] = by_input_channel(module, nats).sum(1)

    def __call__(self, group: Any) -> Tensor:
        """Return one score for each channel of the group, `[channels]`."""
        roots = {root: place for place, root in enumerate(dict.fromkeys(group[0].root_idxs))}
        scores = torch.zeros(len(roots))
        for item in group:
            if item.dep.handler not in READS:
                continue  # a producer, a norm: only what reads the channels has an opinion
            lost = self.lost[item.dep.target.module]
            for channel, root in zip(item.idxs, item.root_idxs, strict=True):
                scores[roots[root]] += lost[channel]
        return scores


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    images, labels = digits_data("test").tensors
    return (model.eval()(images).argmax(1) == labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--macs", type=float, nargs="+", default=[0.6, 0.5, 0.4], help="shares to keep")
    budgets = parser.parse_args().macs
    torch.manual_seed(0)
    model = digits_resnet()
    model.load_state_dict(load_file(digits_weights()))
    example = digits_data("calibration").tensors[0][:1]
    criteria = {
        "entropy lost (this file)": lambda net: EntropyLost(net, example),
        "SynapticImportance": lambda _: ss_pruning.SynapticImportance(),
        "group magnitude": lambda _: tp.importance.GroupMagnitudeImportance(),
    }
    table = Table("criterion", *(f"{share:.0%} of MACs" for share in budgets))
    table.title = f"top-1 after the cut alone, dense {accuracy(model):.1%}"
    for name, make in criteria.items():
        row = []
        for share in budgets:
            net = copy.deepcopy(model)
            ss_pruning.prune_(net, example, macs=share, importance=make(net))
            row.append(f"{accuracy(net):.1%}")
        table.add_row(name, *row)
    Console().print(table)


if __name__ == "__main__":
    main()
