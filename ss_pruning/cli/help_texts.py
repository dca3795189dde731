"""What `--help` says of each command, and its examples."""

from __future__ import annotations

PRUNE_HELP = """Prune a model to a budget.

Channels go; the network becomes smaller and stays an ordinary one. The cut is checked: it must compute what \
the dense model computes with the removed channels masked. Nothing is trained; fine-tune the result as usual.
"""

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

SCORE_HELP = """Show the synaptic strengths of a model, layer by layer; nothing is changed.

The strength of a synapse, the connection from one input channel to one output channel, is the norm of its \
weights times the deviation of what it reads. Its share is its part of the variance of that output.
"""

SCORE_EXAMPLES = """
[bold]Examples[/bold]

    ss-prune score torchvision:resnet18 --weights resnet18.pth

    ss-prune score demo:digits --out strengths.safetensors
"""

RECOVER_HELP = """Train a pruned model, without labels, to have the feature maps of the dense one.

FILE is a model.safetensors of ss-prune prune. A few hundred images and some minutes bring back much of what the cut \
cost; on held-out images the result is never further from the dense model than FILE is.
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

FINETUNE_HELP = """Train or fine-tune on labelled images, prune on the way, in one or many processes.

An epoch ends with a checkpoint in --out. The same command goes on from it, with any number of processes: \
torchrun -m ss_pruning.cli finetune ..., or accelerate launch -m ss_pruning.cli finetune ... . Needs the extra train.
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

EXPORT_HELP = """Write a pruned model for other runtimes, ONNX or torch.export, with a free batch size.

The file is run, ONNX in onnxruntime, and must put out what the model does, or it is not kept. With --int8 it \
computes in eight bits, and how far it is from the model is said.
"""

EXPORT_EXAMPLES = """
[bold]Examples[/bold]

    ss-prune export runs/digits/model.safetensors --format onnx

    ss-prune export runs/net/model.safetensors --model net.py:build --input-size 3x32x32 --out net.pt2

In eight bits, with ranges from photos without labels; and the dense model, to compare with:

    ss-prune export runs/r50/model.safetensors --int8 --calibration photos

    ss-prune export timm:resnet50 --weights resnet50.safetensors --int8 --calibration photos --out dense.int8.onnx
"""

BENCH_HELP = """Measure what pruning gained: dense against pruned, and exported files, in turns, in one process.

Latency with its spread, throughput, peak memory and file size, for every combination of batch, number type and \
layout; how far the outputs are from the first model's; accuracy where there are labels.
"""

BENCH_EXAMPLES = """
[bold]Examples[/bold]

    ss-prune bench runs/digits/model.safetensors --batch 1,64

    ss-prune bench runs/r50/model.safetensors --batch 1,32,256 --dtype float32,bf16 --layout contiguous,channels_last

Files of ss-prune export beside each other:

    ss-prune bench dense.onnx pruned.onnx dense.int8.onnx pruned.int8.onnx --model timm:resnet50 --data imagenet
"""

COMPARE_HELP = """Put two reports side by side: sizes, accuracy, the width of each layer, the settings that differ.

A and B are folders that `ss-prune prune --out` has written, or their report.json.
"""

COMPARE_EXAMPLES = """
[bold]Example[/bold]

    ss-prune compare runs/synaptic runs/magnitude --html runs/compare.html
"""

DOCTOR_HELP = """Say what is installed, what each extra would add, and what PyTorch makes of this machine.

Exit code 2 where a package that is needed is missing.
"""

EXIT_CODES = (
    "Exit codes: 0 done, 1 a bug (with its traceback), 2 refused (the message says what to do), "
    "130 interrupted, 143 ended by SIGTERM."
)
