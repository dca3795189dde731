"""Images to measure on: named sets, folders and tars of images, as evaluation and calibration loaders.

torchvision does the loading; it is imported when called.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from ss_pruning._decode import SPLITS, Progress, check_split, open_rgb, stack, tar_images
from ss_pruning.errors import InputError, ModelError

if TYPE_CHECKING:
    from PIL import Image

    Loader = DataLoader[Any]

CIFAR10_CLASSES = (  # alphabetical, which is the order of the labels
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocess:
    """How images become a model's input.

    Attributes:
        size: channels, height and width of the input.
        mean: subtracted from images in [0, 1], one per channel.
        std: divides them then.
        crop: side of the centre crop relative to the resized image's shorter side.
        interpolation: `"bilinear"`, `"bicubic"` or `"nearest"`.
    """

    size: tuple[int, int, int] = (3, 224, 224)
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    crop: float = 0.875
    interpolation: str = "bilinear"


@dataclass(frozen=True)
class Data:
    """What `open_data` returns.

    Attributes:
        name: as the user gave it.
        evaluation: labelled batches to measure accuracy on.
        calibration: images to read statistics from; labels come along but need not be used.
        classes: number of classes.
    """

    name: str
    evaluation: Loader
    calibration: Loader
    classes: int

    def calibration_images(self) -> Iterator[Tensor]:
        """Yield the batches of calibration images."""
        for images, _ in _batches(self.calibration):
            yield images


def open_data(
    spec: str,
    preprocess: Preprocess,
    *,
    batch_size: int = 64,
    calibration_size: int = 512,
    evaluation_size: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Data:
    """Open a set of images.

    Args:
        spec: `digits`; `cifar10:PATH` (a torchvision root, a folder or a tar; `cifar10` alone looks in the
            usual places); a folder `PATH/<class>/*` or `PATH/{train,test or val}/<class>/*`; or a `.tar` of
            the latter layout.
        preprocess: size and normalisation; digits come normalised.
        batch_size: images a batch.
        calibration_size: how many images to calibrate on, drawn from the training split, or from the
            evaluation images where there is none.
        evaluation_size: how many images to evaluate on, drawn at random; all of them by default.
        seed: draws the images.
        progress: called while a tar is decoded for the first time.

    Raises:
        InputError: nothing usable there; the message names what is missing and how to get it.
    """
    evaluation, calibration, classes = _datasets(spec, preprocess, progress)
    generator = torch.Generator().manual_seed(seed)
    return Data(
        name=spec,
        evaluation=_loader(_drawn(evaluation, evaluation_size, generator), batch_size),
        calibration=_loader(_drawn(calibration, calibration_size, generator), batch_size),
        classes=classes,
    )


def _drawn(dataset: Dataset[Any], size: int | None, generator: torch.Generator) -> Dataset[Any]:
    """Return so many of the images, drawn without order; the set itself where all are wanted."""
    total = len(dataset)  # type: ignore[arg-type]
    chosen = torch.randperm(total, generator=generator)
    return dataset if size is None else Subset(dataset, chosen[:size].tolist())


def accuracy(model: nn.Module, loader: Loader, progress: Progress | None = None) -> float:
    """Return the fraction of images whose largest output is their label (top-1).

    Args:
        model: classifier with outputs `[n, classes]`; run in eval mode on the device of its parameters, and
            left in the mode it was in.
        loader: batches of (images, labels).
        progress: called after each batch.

    Raises:
        InputError: the outputs are no class scores, or a label has no output.
        ModelError: the model does not run on these images.
    """
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    modes = {module: module.training for module in model.modules()}
    right, seen, total = 0, 0, len(loader.dataset)  # type: ignore[arg-type]
    model.eval()
    try:
        with torch.inference_mode():
            for images, labels in _batches(loader):
                right += _right(model, images.to(device), labels.to(device))
                seen += len(labels)
                if progress is not None:
                    progress("accuracy", seen, total)
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not seen:
        raise InputError("no images to measure accuracy on.")
    return right / seen


def _batches(loader: Loader) -> Iterator[tuple[Tensor, Tensor]]:
    try:
        yield from loader
    except InputError as error:
        # A worker process sends its whole traceback as the message; the last part is what was said.
        raise InputError(str(error).rpartition("InputError: ")[2].strip()) from error


def _right(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    try:
        outputs = model(images)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ModelError(
            f"the model does not run on images of shape {list(images.shape)}: {error}. "
            "Check the input size (--input-size)."
        ) from error
    if not isinstance(outputs, Tensor) or outputs.ndim != 2:
        what = f"shape {list(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
        raise InputError(f"accuracy needs a classifier with outputs [n, classes]; this model returns {what}.")
    if len(labels) and int(labels.max()) >= outputs.shape[1]:
        raise InputError(
            f"the images have labels up to {int(labels.max())}, but the model has {outputs.shape[1]} "
            "outputs: these images are not of the classes that it was trained on."
        )
    return int((outputs.argmax(1) == labels).sum())


def _datasets(
    spec: str, preprocess: Preprocess, progress: Progress | None
) -> tuple[Dataset[Any], Dataset[Any], int]:
    """Return evaluation images, calibration images and the number of classes."""
    if spec == "digits":
        return (*_digits(preprocess), 10)
    if spec == "cifar10" or spec.startswith("cifar10:"):
        place = spec.partition(":")[2] or _find_cifar10()
        test, train = (
            _Normalised(cifar10(place, split, progress), preprocess) for split in ("test", "train")
        )
        return test, train, 10
    path = Path(spec)
    if path.is_file() and path.suffix == ".tar":
        stored, classes = tar_images(path, "test", progress)
        train = _Normalised(tar_images(path, "train", progress)[0], preprocess)
        return _Normalised(stored, preprocess), train, len(classes)
    if path.is_dir():
        return _folders(path, preprocess)
    raise InputError(
        f"no data at {spec!r}. Give digits, cifar10:PATH, a folder with one folder of images per class, "
        "or a .tar with train/<class>/* and test/<class>/*."
    )


def _digits(preprocess: Preprocess) -> tuple[Dataset[Any], Dataset[Any]]:
    from ss_pruning.demo import digits_data

    if preprocess.size != (1, 8, 8):
        raise InputError(f"digits are 1x8x8 images; this model takes {_times(preprocess.size)}.")
    return digits_data("test"), digits_data("calibration")


def _folders(root: Path, preprocess: Preprocess) -> tuple[Dataset[Any], Dataset[Any], int]:
    from torchvision.datasets import ImageFolder

    evaluation = _split_folder(root, "test") or root
    training = _split_folder(root, "train")
    transform = _transform(preprocess)
    try:
        test = ImageFolder(str(evaluation), transform=transform, loader=open_rgb)
        train = (
            ImageFolder(str(training), transform=transform, loader=open_rgb) if training is not None else test
        )
    except FileNotFoundError as error:
        raise InputError(
            f"no images by class in {str(evaluation)!r}: {error}. One folder of images per class is needed."
        ) from error
    return test, train, len(test.classes)


def _transform(preprocess: Preprocess) -> Callable[[Image.Image], Tensor]:
    """Resize the shorter side, crop the centre, scale to [0, 1] and normalise."""
    from torchvision import transforms
    from torchvision.transforms import InterpolationMode

    channels, height, width = preprocess.size
    resized = [round(side / preprocess.crop) for side in (height, width)]
    steps = [
        transforms.Resize(
            resized[0] if height == width else resized, InterpolationMode(preprocess.interpolation)
        ),
        transforms.CenterCrop((height, width)),
        *([transforms.Grayscale()] if channels == 1 else []),
        transforms.ToTensor(),
        transforms.Normalize(preprocess.mean, preprocess.std),
    ]
    composed: Callable[[Image.Image], Tensor] = transforms.Compose(steps)
    return composed


class _Normalised(Dataset[tuple[Tensor, Tensor]]):
    """Stored uint8 images, normalised and resized when asked for.

    Args:
        stored: uint8 images and labels.
        preprocess: the size and normalisation to bring them to.
    """

    def __init__(self, stored: TensorDataset, preprocess: Preprocess) -> None:
        channels = stored.tensors[0].shape[1]
        if preprocess.size[0] != channels:
            size = _times(preprocess.size)
            raise InputError(f"the images have {channels} channels; this model takes {size}.")
        self.stored, self.preprocess = stored, preprocess

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = self.stored[index]
        image = normalise(image, self.preprocess.mean, self.preprocess.std)
        size = self.preprocess.size[1:]
        if image.shape[1:] != size:
            mode = self.preprocess.interpolation
            image = nn.functional.interpolate(image[None], size, mode=mode, antialias=mode != "nearest")[0]
        return image, label


def _loader(dataset: Dataset[Any], batch_size: int) -> Loader:
    # Decoding photos is worth processes of its own; tensors in memory are not.
    in_memory = isinstance(dataset, TensorDataset | _Normalised) or (
        isinstance(dataset, Subset) and isinstance(dataset.dataset, TensorDataset | _Normalised)
    )
    return DataLoader(dataset, batch_size=batch_size, num_workers=0 if in_memory else _workers())


def _workers() -> int:
    """Count the processors that this process may use, up to four."""
    allowed = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    return min(4, len(allowed(0)) if allowed is not None else os.cpu_count() or 1)


def _find_cifar10() -> Path:
    for place in (Path("data"), Path("../shared/data/cifar10-png.tar")):
        if place.is_file() or (place / "cifar-10-batches-py").is_dir():
            return place
    raise InputError(
        f"no CIFAR-10 found; say where it is with cifar10:PATH. {_how_to_download(Path('data'))}"
    )


def cifar10(
    root_or_tar: str | os.PathLike[str], split: str = "test", progress: Progress | None = None
) -> TensorDataset:
    """Return one split of CIFAR-10 as it is stored: no scaling, no normalisation.

    Args:
        root_or_tar: the root of torchvision's own CIFAR-10 (it holds `cifar-10-batches-py`), or a folder or
            `.tar` in ImageFolder layout (`train/<class>/*.png`, `test/<class>/*.png`).
        split: `"train"` or `"test"`.
        progress: called while a tar or folder is decoded.

    Returns:
        `TensorDataset` of images `[n, 3, 32, 32]` uint8 and labels `[n]` int64, the labels in alphabetical
        order of the class names, which is CIFAR-10's own.

    Raises:
        InputError: nothing there that is CIFAR-10; the message says how to get it.
    """
    path = Path(root_or_tar)
    check_split(split)
    if path.is_file():
        dataset, classes = tar_images(path, split, progress)
    elif (path / "cifar-10-batches-py").is_dir():
        return _torchvision_cifar10(path, split)
    elif path.is_dir() and _split_folder(path, split) is not None:
        dataset, classes = _folder_images(path, split, progress)
    else:
        raise InputError(f"no CIFAR-10 at {str(path)!r}. {_how_to_download(path)}")
    if tuple(classes) != CIFAR10_CLASSES:
        raise InputError(
            f"{str(path)!r} holds the classes {_some(classes)}, not CIFAR-10's ten. "
            "Give it as an image folder instead, without the name cifar10."
        )
    return dataset


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Scale uint8 images to [0, 1], then to zero mean and unit deviation per channel.

    Args:
        images: `[n, channels, height, width]` or `[channels, height, width]`, uint8.
        mean: one per channel, for images in [0, 1].
        std: one per channel, positive.

    Returns:
        The images as float32, same shape and device.

    Raises:
        InputError: the images are not uint8, or the channels differ in number.
    """
    if images.dtype != torch.uint8:
        raise InputError(f"normalise() takes uint8 images (0 to 255), not {images.dtype}.")
    channels = images.shape[-3] if images.ndim >= 3 else 0
    if len(mean) != channels or len(std) != channels:
        raise InputError(
            f"images of shape {tuple(images.shape)} have {channels} channels, but mean has {len(mean)} "
            f"values and std {len(std)}; give one per channel."
        )
    if min(std) <= 0:
        raise InputError(f"std must be positive in every channel, not {tuple(std)}.")
    shape = (channels, 1, 1)
    centre = torch.tensor(mean, dtype=torch.float32, device=images.device).view(shape)
    scale = torch.tensor(std, dtype=torch.float32, device=images.device).view(shape)
    return images.float().div_(255).sub_(centre).div_(scale)


def _folder_images(root: Path, split: str, progress: Progress | None) -> tuple[TensorDataset, list[str]]:
    from torchvision.datasets import ImageFolder

    folder = ImageFolder(str(_split_folder(root, split)))
    opened = ((path, path) for path, _ in folder.samples)
    images = stack(opened, len(folder.samples), f"decoding {root.name} ({split})", progress)
    return TensorDataset(images, torch.tensor(folder.targets, dtype=torch.int64)), list(folder.classes)


def _torchvision_cifar10(root: Path, split: str) -> TensorDataset:
    from torchvision.datasets import CIFAR10

    try:
        stored = CIFAR10(str(root), train=split == "train", download=False)
    except RuntimeError as error:
        raise InputError(
            f"the CIFAR-10 at {str(root)!r} is damaged or incomplete. {_how_to_download(root)}"
        ) from error
    images = torch.from_numpy(stored.data).permute(0, 3, 1, 2).contiguous()
    return TensorDataset(images, torch.tensor(stored.targets, dtype=torch.int64))


def _how_to_download(root: Path) -> str:
    return (
        "Download torchvision's copy with\n"
        f'  python -c "from torchvision.datasets import CIFAR10; CIFAR10({str(root)!r}, download=True)"\n'
        "or give a folder or .tar with train/<class>/*.png and test/<class>/*.png."
    )


def _split_folder(root: Path, split: str) -> Path | None:
    return next((root / name for name in SPLITS[split] if (root / name).is_dir()), None)


def _times(size: Sequence[int]) -> str:
    return "x".join(map(str, size))


def _some(names: Sequence[str], most: int = 5) -> str:
    listed = ", ".join(repr(name) for name in names[:most])
    return f"{listed} and {len(names) - most} more" if len(names) > most else listed
