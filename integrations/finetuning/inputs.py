"""What a fine-tuning run starts from: images and models."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import transforms
from torchvision.transforms import InterpolationMode

import ss_pruning
from ss_pruning._utils.files import absent
from ss_pruning._utils.running import checked_call, preserved
from ss_pruning.errors import InputError
from ss_pruning.integrations.finetuning.options import Options
from ss_pruning.io.checkpoint import architecture_of
from ss_pruning.sources.architecture_names import build_named
from ss_pruning.sources.labelled_folder import LabelledFolder, class_names
from ss_pruning.sources.models import build_model, input_of
from ss_pruning.sources.preprocessing import Preprocess, transform


class Draws(Sampler[int]):
    """The images of an epoch in random order, each as a number that also says which epoch it is drawn for."""

    def __init__(self, images: int, seed: int) -> None:
        self.images, self.seed, self.epoch = images, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Draw for that epoch from now on."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.images

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch)
        order = torch.randperm(self.images, generator=generator)
        return iter((order + self.epoch * self.images).tolist())


class Augmented(Dataset[Any]):
    """Images by the numbers of `Draws`: what chance does to one depends on seed and number, not on who loads it."""

    def __init__(self, folder: LabelledFolder, seed: int) -> None:
        self.folder, self.seed = folder, seed

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, draw: int) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1_000_003 * self.seed + draw)
            return self.folder[draw % len(self.folder)]


def loaders(options: Options, preprocess: Preprocess) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Batches for all processes together: accelerate's `split_batches` gives each its part."""
    augment = transforms.Compose(
        [
            transforms.RandomResizedCrop(
                preprocess.size[1:],
                scale=(options.crop, 1),
                interpolation=InterpolationMode(preprocess.interpolation),
            ),
            transforms.RandomHorizontalFlip(),
            *([transforms.Grayscale()] if preprocess.size[0] == 1 else []),
            transforms.ToTensor(),
            transforms.Normalize(preprocess.mean, preprocess.std),
        ]
    )
    train, val = (
        LabelledFolder(options.data / part, change)
        for part, change in (("train", augment), ("val", transform(preprocess)))
    )
    if train.classes != val.classes:
        raise InputError(f"'{options.data}' has other classes in train than in val")
    if len(train) < options.batch:
        raise InputError(f"{len(train)} images are less than one batch: lower --batch {options.batch}")
    shared: dict[str, Any] = {
        "batch_size": options.batch,
        "num_workers": options.workers,
        "pin_memory": torch.cuda.is_available(),
    }
    draws = Draws(len(train), options.seed)
    return (
        DataLoader(Augmented(train, options.seed), sampler=draws, drop_last=True, **shared),
        DataLoader(val, **shared),
    )


def spec_of(options: Options) -> str:
    """The architecture as `ss_pruning.load` takes it, with an output for each class.

    Raises:
        InputError: The folders of images are missing.
    """
    for part in ("train", "val"):
        if not (options.data / part).is_dir():
            raise InputError(
                f"'{options.data}' needs the folders train and val, with one folder for each class"
            )
    classes = len(class_names(options.data / "train"))
    name = named(options)
    takes_classes = name.startswith(("timm:", "torchvision:")) and "num_classes=" not in name
    return f"{name},num_classes={classes}" if takes_classes else name


def named(options: Options) -> str:
    """The architecture as the user says; a bare word is a name of timm's."""
    return options.model if ":" in options.model else f"timm:{options.model}"


def with_file_opened(options: Options) -> Options:
    """The same, with the architecture and the weights of a file of ours where that is the model.

    Raises:
        InputError: It names no architecture, or is not there.
    """
    file = Path(options.model)
    is_path = file.suffix == ".safetensors" or (len(file.parts) > 1 and ":" not in options.model)
    if is_path and not file.is_file():  # no name of timm's, which would be searched for in vain
        raise InputError(absent(file))
    if not (file.is_file() and is_ours(file)):
        return options
    spec = architecture_of(file)
    if spec is None:
        raise InputError(
            f"{str(file)!r} does not name its architecture: give that as MODEL, and the file as --weights"
        )
    build_named(spec, file)  # of what a file names only plain options are followed
    return replace(options, model=spec, weights=file)


def dense_model(options: Options, spec: str, weights: Path | None) -> nn.Module:
    """The architecture, with a new classifier where the weights are of other classes."""
    found = re.search(r"num_classes=(\d+)", spec)
    if weights is None or found is None:
        return build_model(spec, weights)
    model, classes = build_model(named(options), weights), int(found[1])
    if getattr(model, "num_classes", classes) != classes:
        model.reset_classifier(classes)  # type: ignore[operator]
    return model


def starting_model(options: Options, spec: str) -> nn.Module:
    """From plain weights, from a file of ss_pruning (pruned, perhaps), or from nothing."""
    torch.manual_seed(options.seed)
    if options.weights is not None and is_ours(options.weights):
        return ss_pruning.load(options.weights, lambda: build_model(spec))
    return dense_model(options, spec, options.weights)


def is_ours(path: Path) -> bool:
    """True for a file that `ss_pruning.save` has written."""
    try:
        with safe_open(str(path), framework="pt") as file:
            return "ss_pruning" in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def check_outputs(model: nn.Module, example: Tensor, data: Path) -> None:
    """See that the model tells as many classes apart as there are folders.

    Raises:
        InputError: It has fewer outputs, or outputs of another kind.
        ModelError: It does not run on the images.
    """
    with preserved(model, training=False), torch.no_grad():
        outputs = checked_call(model, example)
    classes = len(class_names(data / "train"))
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or outputs.shape[1] < classes:
        what = f"shape {list(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
        raise InputError(
            f"'{data / 'train'}' has {classes} classes, and the model puts out {what} for one image, not "
            f"[1, {classes}]: give its architecture so many classes, as in MODEL,num_classes={classes}"
        )


def preprocess_of(options: Options, spec: str, model: nn.Module) -> Preprocess:
    """The input that the model was made for, in the asked size.

    Images are grey, from 0 to 1, where the first convolution reads one channel and nothing else is known of it.
    """
    found = input_of(spec, model)
    reads = next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if reads == 1 != found.size[0]:
        found = replace(found, size=(1, *found.size[1:]), mean=(0.0,), std=(1.0,))
    if not options.size:
        return found
    size = (found.size[0], options.size, options.size)
    return Preprocess(size, found.mean, found.std, found.crop, found.interpolation)
