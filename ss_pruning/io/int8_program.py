"""Programs of `torch.export` in eight bits, by torchao's quantisation of exported programs and its recipe for x86.

Ranges come from calibration images, weights have a scale for each output channel, as in ONNX (`int8_onnx`); batch norms
are folded. The steps are those of https://docs.pytorch.org/ao/stable/pt2e_quantization/pt2e_quant_x86_inductor.html.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node

from ss_pruning._utils.running import call
from ss_pruning.errors import ModelError, SSPruningError, first_line
from ss_pruning.importance.calibration import Batch
from ss_pruning.io.export import followed
from ss_pruning.io.int8_onnx import AT_ONCE, NO_LAYER

_LAYERS = ("conv1d", "conv2d", "conv3d", "linear", "conv_transpose2d")


def quantised_program(model: nn.Module, images: Batch) -> ExportedProgram:
    """The model, on the CPU and in eval mode, in eight bits, with ranges from images; not changed.

    Raises:
        ModelError: `torch.export` cannot follow the model, or torchao cannot quantise it.
    """
    example = images[:2].inputs
    # Traced by its Python code (strict): else a module that is called twice is one pattern, which the recipe refuses.
    traced = followed(model, example, strict=True).module()
    assert isinstance(traced, GraphModule)
    if not _layers(traced):
        raise ModelError(NO_LAYER)
    try:
        quantised = _quantised(traced, images)
    except SSPruningError:
        raise
    except Exception as error:
        raise ModelError(
            f"torchao cannot quantise the model ({first_line(error)}); write ONNX instead, *.onnx"
        ) from error
    return followed(quantised, example)


def _quantised(traced: GraphModule, images: Batch) -> GraphModule:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    class Quantizer(x86.X86InductorQuantizer):  # type: ignore[misc]
        """Leaves in float what leads to no layer, as `int8_onnx` does."""

        def annotate(self, model: GraphModule) -> GraphModule:
            """Say what is to be quantised, and how."""
            super().annotate(model)
            for node in _decoding(model.graph):
                node.meta.pop("quantization_annotation", None)
            return model

    recipe = Quantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    observed = prepare_pt2e(traced, recipe)
    with torch.no_grad():
        for part in images.split(AT_ONCE):
            call(observed, part.inputs)
    quantised: GraphModule = convert_pt2e(observed)
    _drop_unused(quantised)
    return quantised


def _layers(network: GraphModule) -> list[Node]:
    """The nodes that multiply by weights in float32."""
    float32 = {name for name, tensor in network.state_dict().items() if tensor.dtype is torch.float32}
    return [node for node in network.graph.nodes if _is_layer(node) and str(node.args[1].target) in float32]


def _is_layer(node: Node) -> bool:
    """Whether it is a layer that was learned; not so the mean over a softmax, by which detectors decode distances."""
    name = getattr(node.target, "_opname", None)
    return name in _LAYERS and node.args[1].op == "get_attr" and not _is_mean(node)  # type: ignore[union-attr]


def _is_mean(node: Node) -> bool:
    before = node.args[0]
    while isinstance(before, Node):
        name = getattr(before.target, "_opname", None)
        if name not in ("view", "reshape", "transpose", "permute"):
            return name in ("softmax", "_softmax")
        before = before.args[0]
    return False


def _decoding(graph: Graph) -> list[Node]:
    """The nodes that lead to no layer: pixels beside probabilities, say, which no common scale fits."""
    wanted: set[Node] = set()
    found = []
    for node in reversed(graph.nodes):
        if _is_layer(node) or node in wanted:
            wanted.update(node.all_input_nodes)
        else:
            found.append(node)
    return found


def _drop_unused(network: GraphModule) -> None:
    """Remove weights that were replaced by their bytes: they would be written, too."""
    used = {node.target for node in network.graph.nodes if node.op == "get_attr"}
    for name in [*dict(network.named_parameters()), *dict(network.named_buffers())]:
        if name not in used:
            path, _, attribute = name.rpartition(".")
            delattr(network.get_submodule(path), attribute)
