"""Fine-tune on folders of images: `ss-prune finetune`, with all its options, for launchers that take a module.

python -m examples.finetune_timm resnet50 --weights resnet50.safetensors --data photos --macs 0.5 --distill 0.5
accelerate launch --num_processes 8 --mixed_precision bf16 -m examples.finetune_timm resnet50 --data photos ...
"""

import sys

from ss_pruning.cli.app import app


def main(argv: list[str] | None = None) -> int:
    return app(["finetune", *(sys.argv[1:] if argv is None else argv)], standalone_mode=False) or 0


if __name__ == "__main__":
    sys.exit(main())
