"""Examples for the help of each command, whose docstring is the rest of it."""

from __future__ import annotations

PRUNE_EXAMPLES = """
[bold]Examples[/bold]

Half the multiply-accumulates of the built-in demo, with accuracy before and after:

    ss-prune prune demo:digits --macs 0.5 --data digits --out runs/digits

Your own weights, and a report:

    ss-prune prune timm:resnet50 --weights resnet50.safetensors --macs 0.8 --out runs/r50

A model of your own, four fifths of its parameters, one layer left alone:

    ss-prune prune net.py:build --weights net.pth --input-size 3x32x32 --params 0.8 --ignore head

A model that keeps working, without any image:

    ss-prune prune net.py:build --weights net.pth --macs 0.7 --compensation reconstruct --calibration synthetic

The same on photos of your own, without labels:

    ss-prune prune net.py:build --weights net.pth --macs 0.7 --compensation reconstruct --calibration photos

Six tenths of the time, as measured on this machine eight images at a time:

    ss-prune prune timm:resnet50 --weights resnet50.safetensors --latency 0.6 --batch 8 --out runs/r50

Another criterion for comparison:

    ss-prune prune demo:digits --macs 0.5 --data digits --importance magnitude
"""

SCORE_EXAMPLES = """
[bold]Examples[/bold]

    ss-prune score torchvision:resnet18 --weights resnet18.pth

    ss-prune score demo:digits --out strengths.safetensors
"""

RECOVER_EXAMPLES = """
[bold]Examples[/bold]

Photos without labels, five minutes; the dense weights are found in the report beside the file:

    ss-prune recover runs/r50/model.safetensors --calibration photos --out runs/r50/recovered.safetensors

Dense weights by name, accuracy before and after, half an hour that may be interrupted:

    ss-prune recover pruned.safetensors --weights resnet50.safetensors --calibration photos --data imagenet \\
--minutes 30 --checkpoint recovery.safetensors

Without any image:

    ss-prune recover runs/digits/model.safetensors --calibration synthetic --steps 200
"""

FINETUNE_EXAMPLES = """
[bold]Examples[/bold]

Prune at once, fine-tune taught by the dense model, export:

    ss-prune finetune resnet50 --weights resnet50.safetensors --data photos --latency 0.6 --distill 0.5 --export onnx

Train towards sparse synapses, prune, go on:

    ss-prune finetune resnet50 --data photos --penalty 1e-4 --prune-epoch 20 --sparsity 0.6 --macs 0.7

Fine-tune what ss-prune prune or recover has written:

    ss-prune finetune runs/r50/recovered.safetensors --data photos --epochs 10
"""

EXPORT_EXAMPLES = """
[bold]Examples[/bold]

    ss-prune export runs/digits/model.safetensors --format onnx

    ss-prune export runs/digits/model.safetensors --format openvino

    ss-prune export runs/net/model.safetensors --model net.py:build --input-size 3x32x32 --out net.pt2

In eight bits, with ranges from photos without labels; and the dense model, to compare with:

    ss-prune export runs/r50/model.safetensors --int8 --calibration photos

    ss-prune export runs/r50/model.safetensors --int8 --calibration photos --format pt2

    ss-prune export timm:resnet50 --weights resnet50.safetensors --int8 --calibration photos --out dense.int8.onnx
"""

BENCH_EXAMPLES = """
[bold]Examples[/bold]

    ss-prune bench runs/digits/model.safetensors --batch 1,64

    ss-prune bench runs/r50/model.safetensors --batch 1,32,256 --dtype float32,bf16 --layout contiguous,channels_last

Files of ss-prune export beside each other:

    ss-prune bench dense.onnx pruned.onnx dense.int8.onnx pruned.int8.onnx --model timm:resnet50 --data imagenet
"""

COMPARE_EXAMPLES = """
[bold]Example[/bold]

    ss-prune compare runs/synaptic runs/magnitude --html runs/compare.html
"""

EXIT_CODES = (
    "Exit codes: 0 done, 1 a bug (with its traceback), 2 refused (the message says what to do), "
    "130 interrupted, 143 ended by SIGTERM."
)
