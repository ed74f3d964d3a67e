"""Three unrelated, frozen feature spaces in which images are compared.

- `trained`: the last hidden layer of a small classifier of captions, trained once on a line's first data revision.
- `random`: responses of fixed random convolutions, without training. It detects texture and noise, but not meaning.
- `scattering`: energies of wavelets at several scales and directions, and how these energies vary (Bruna and Mallat 2013),
  without training. It detects blur, compression and training that was cut short, unlike the other two (measured in
  docs/decisions/0068-third-feature-space-scattering.md).

All are standardised on the first revision and stored in one file. Its hash is part of every figure, and figures with different
hashes are never compared. A file from an older version of ferry holds only the first two spaces. Distances in these spaces are
named `fd` and `kd`, never "FID", because that name belongs to Inception features. Inception features are available too, from a
file that the user provides (`published_features`), for figures that are to be compared with papers.
"""

from __future__ import annotations

import hashlib
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from model.data import Dataset, mix, to_unit
from model.errors import CheckpointError, DataError
from model.scorecard import Sha256
from model.train import write_safely

DIMENSIONS = 64
SPACES = ("trained", "random", "scattering")
DIRECTIONS = 6
OCTAVES = 4  # at most; an image of 16 pixels has three
WAVELET = 7  # side of a wavelet, in pixels at its scale
TRAINING_STEPS = 300
INCEPTION_SIZE = 299  # pixels
INCEPTION_BATCH = 32
BATCH = 256  # images that are processed at a time
Features = npt.NDArray[np.float64]  # [n, DIMENSIONS]


class Classifier(nn.Module):
    """Classifier that assigns captions to images; its last hidden layer is the feature space."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, 32, 3, stride=2, padding=1)
        self.second = nn.Conv2d(32, 48, 3, stride=2, padding=1)
        self.hidden = nn.Linear(48 * 16, DIMENSIONS)
        self.last = nn.Linear(DIMENSIONS, classes)

    def features(self, x: Tensor) -> Tensor:
        """Compute the features of images, [B, C, R, R] -> [B, DIMENSIONS]."""
        h = F.relu(self.second(F.relu(self.first(x))))
        return self.hidden(F.adaptive_avg_pool2d(h, 4).flatten(1))  # [B, DIMENSIONS]

    def forward(self, x: Tensor) -> Tensor:
        """Compute the scores of the captions for images, [B, C, R, R] -> [B, classes]."""
        return self.last(F.relu(self.features(x)))


@dataclass(frozen=True)
class FeatureSpaces:
    """Feature spaces of one line."""

    tensors: dict[str, Tensor]
    sha256: Sha256

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the available spaces: all of SPACES, or those of an older version of ferry."""
        return tuple(space for space in SPACES if f"{space}.scale" in self.tensors)

    def __call__(self, space: str, images: npt.NDArray[np.uint8]) -> Features:
        """Compute the features of uint8 images [n, C, R, R] in one space: float64 [n, DIMENSIONS]."""
        with torch.inference_mode():
            raw = torch.cat([self.raw(space, part).double() for part in to_unit(images).split(BATCH)])
        standard = (raw - self.tensors[f"{space}.mean"]) / self.tensors[f"{space}.deviation"]
        result: Features = (standard @ self.tensors[f"{space}.axes"] if f"{space}.axes" in self.tensors else standard).numpy()
        return result

    def scale(self, space: str) -> float:
        """Return the median distance between two images of the first revision; the kernel's widths are multiples of it."""
        return float(self.tensors[f"{space}.scale"])

    def raw(self, space: str, x: Tensor) -> Tensor:
        """Compute the features before standardisation, [B, C, R, R] -> [B, DIMENSIONS]; another width if `axes` projects them."""
        if space == "scattering":
            return scattering(x)
        if space == "random":
            return random_features(x, self.tensors["random.first"], self.tensors["random.second"])
        classifier = Classifier(x.shape[1], len(self.tensors["trained.last.bias"]))
        classifier.load_state_dict(
            {k.removeprefix("trained."): v for k, v in self.tensors.items() if k.startswith("trained.") and k.count(".") == 2}
        )
        return classifier.features(x)


def random_features(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Compute mean and deviation of the responses to two layers of fixed filters, [B, C, R, R] -> [B, DIMENSIONS]."""
    h = F.avg_pool2d(F.relu(F.conv2d(x, first, padding=1)), 2)
    h = F.relu(F.conv2d(h, second, padding=1)).flatten(2)
    return torch.cat((h.mean(dim=2), h.std(dim=2)), dim=1)


def wavelets() -> tuple[Tensor, Tensor]:
    """Compute real and imaginary parts of Morlet wavelets at the finest scale, each [DIRECTIONS, 1, WAVELET, WAVELET]."""
    half = WAVELET // 2
    y, x = np.mgrid[-half : half + 1, -half : half + 1]
    made = []
    for direction in range(DIRECTIONS):
        angle = np.pi * direction / DIRECTIONS
        along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
        envelope = np.exp(-(along**2 + (0.5 * across) ** 2) / (2 * 0.8**2))
        wave = envelope * np.exp(0.75j * np.pi * along)
        wave -= envelope * wave.sum() / envelope.sum()  # ignores the mean
        made.append(wave / np.abs(wave).sum())
    stacked = torch.from_numpy(np.stack(made)[:, None])
    return stacked.real.float(), stacked.imag.float()


def scattering(x: Tensor) -> Tensor:
    """Compute the logarithms of a two-layer scattering transform, averaged over the image, [B, C, R, R] -> [B, ...].

    Each octave halves the image and uses the same wavelets.
    """
    real, imaginary = wavelets()

    def energies(h: Tensor) -> Tensor:
        """Compute the moduli of wavelet responses, smooth at 0, [B, 1, S, S] -> [B, DIRECTIONS, S, S]."""
        h = F.pad(h, (WAVELET // 2,) * 4, mode="reflect")
        return torch.sqrt(F.conv2d(h, real) ** 2 + F.conv2d(h, imaginary) ** 2 + 1e-8)

    octaves = max(1, min(OCTAVES, int(np.log2(x.shape[2])) - 1))
    found = []
    for channel in x.split(1, dim=1):
        found += [
            torch.log(channel.flatten(1).mean(dim=1, keepdim=True) + 2),
            torch.log(channel.flatten(1).std(dim=1, keepdim=True) + 0.02),
        ]
        h = channel
        for octave in range(octaves):
            first = energies(h)  # [B, D, S, S]
            found += [torch.log(first.flatten(2).mean(dim=2) + 1e-3), torch.log(first.flatten(2).std(dim=2) + 1e-3)]
            for direction in first.split(1, dim=1):
                coarse = direction
                for _ in range(octave + 1, octaves):
                    coarse = F.avg_pool2d(coarse, 2)
                    found.append(torch.log(energies(coarse).flatten(2).mean(dim=2) + 1e-3))
            h = F.avg_pool2d(h, 2) if octave + 1 < octaves else h
    return torch.cat(found, dim=1)


def fit(dataset: Dataset, path: Path, seed: int = 0) -> FeatureSpaces:
    """Fit the spaces of a line to its first data revision and write them to `path`; an existing file is loaded instead."""
    if path.is_file():
        return load(path)
    channels = dataset.images.shape[1]
    generator = torch.Generator().manual_seed(mix(seed, 3))
    tensors: dict[str, Tensor] = {
        "random.first": torch.randn((24, channels, 3, 3), generator=generator) * (9 * channels) ** -0.5,
        "random.second": torch.randn((DIMENSIONS // 2, 24, 3, 3), generator=generator) * (9 * 24) ** -0.5,
    }
    names = sorted(set(dataset.captions))
    target = torch.tensor([names.index(c) for c in dataset.captions])
    training = dataset.training()
    torch.manual_seed(mix(seed, 4))
    classifier = Classifier(channels, len(names))
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=0.05)
    for _ in range(TRAINING_STEPS):
        chosen = training[torch.randint(0, len(training), (64,), generator=generator).numpy()]
        loss = F.cross_entropy(classifier(to_unit(dataset.images[chosen])), target[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tensors |= {f"trained.{k}": v.detach() for k, v in classifier.state_dict().items()}
    spaces = FeatureSpaces(tensors, "")
    x = to_unit(dataset.images[training[:2000]])
    for space in SPACES:
        with torch.inference_mode():
            raw = torch.cat([spaces.raw(space, part).double() for part in x.split(BATCH)])
        tensors[f"{space}.mean"] = raw.mean(dim=0)
        tensors[f"{space}.deviation"] = raw.std(dim=0).clamp(min=1e-6)
        standard = (raw - tensors[f"{space}.mean"]) / tensors[f"{space}.deviation"]
        if standard.shape[1] != DIMENSIONS:  # project on the main axes; if there are fewer, the rest is 0
            axes = torch.linalg.svd(standard, full_matrices=False).Vh[:DIMENSIONS].T
            tensors[f"{space}.axes"] = F.pad(axes, (0, DIMENSIONS - axes.shape[1])).contiguous()
            standard = standard @ tensors[f"{space}.axes"]
        tensors[f"{space}.scale"] = torch.pdist(standard[:1000]).median()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safely(path, tensors)
    return load(path)


def load(path: Path) -> FeatureSpaces:
    """Open the feature spaces that `fit` wrote.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        tensors = load_file(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read; restore it from a backup, because past figures depend on it") from error
    if not {f"{space}.scale" for space in ("trained", "random")} <= set(tensors):
        raise CheckpointError(f"{path} holds no feature spaces; restore it from a backup, because past figures depend on it")
    return FeatureSpaces(tensors, digest)


def unfinished(present: Path, key: str) -> Path:
    """Name the file in which a line's next spaces are made; a killed call leaves it, and the next call with the same key uses it.

    Files of other keys are deleted, and so is one that is damaged.

    Args:
        present: file of the line's present spaces.
        key: 16 hexadecimal digits that stand for all that the next spaces depend on.
    """
    fresh = present.with_name(f".{present.stem}.{key}.safetensors")
    for other in present.parent.glob(f".{present.stem}.{'[0-9a-f]' * 16}.safetensors"):
        if other != fresh or not _is_whole(other):
            other.unlink()
    return fresh


def _is_whole(path: Path) -> bool:
    """Check whether a file holds complete feature spaces; a killed call may have left a part of them."""
    try:
        load(path)
    except CheckpointError:
        return False
    return True


def put_in_place(fresh: Path, present: Path, before: Sha256) -> None:
    """Make new spaces the line's present ones, and keep the previous ones, because past scorecards name them.

    Args:
        fresh: file of the new spaces; it is moved, or deleted if it holds the present ones.
        present: file of the present spaces.
        before: hash of the present spaces.
    """
    if hashlib.sha256(fresh.read_bytes()).hexdigest() == before:
        fresh.unlink()
        return
    kept = present.with_name(f"{present.stem}.{before[:16]}.safetensors")
    if not kept.exists():
        copy = kept.with_name(f".{kept.name}.tmp")
        shutil.copyfile(present, copy)  # no link, because not every file system has links
        copy.replace(kept)
    fresh.replace(present)


def published_features(file: Path) -> tuple[Callable[[npt.NDArray[np.uint8]], Features], Sha256]:
    """Load a network from a TorchScript file; return a function that computes its features, and the hash of the file.

    The function follows the usual FID protocol. The network takes float32 [B, 3, 299, 299] with values from 0 to 255 and gives
    [B, d]. A network with an option `return_features`, like NVIDIA's `inception-2015-12-05.pt`, is called with it. Images are
    enlarged bilinearly with antialiasing, and grey ones are repeated in three channels. A TorchScript file is a program: run only
    one that you trust.

    Raises:
        DataError: there is no such file.
        CheckpointError: the file is not TorchScript. The returned function raises it if the network does not take such images or
            does not give finite features.
    """
    if not file.is_file():
        raise DataError(f"there is no file {file}; name a TorchScript file of Inception weights")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch about TorchScript, which is what such files are
            network = torch.jit.load(str(file), map_location="cpu").eval()
    except (RuntimeError, ValueError, OSError) as error:
        raise CheckpointError(
            f"{file} is not a TorchScript file; save the network with torch.jit.script(...).save(...)"
        ) from error
    options = {"return_features": True} if "return_features" in {a.name for a in network.forward.schema.arguments} else {}

    def features(images: npt.NDArray[np.uint8]) -> Features:
        parts = []
        for first in range(0, len(images), INCEPTION_BATCH):
            x = torch.from_numpy(np.array(images[first : first + INCEPTION_BATCH])).float()
            x = x.expand(-1, 3, -1, -1)  # [B, 1 or 3, R, R] -> [B, 3, R, R]
            x = F.interpolate(x, (INCEPTION_SIZE, INCEPTION_SIZE), mode="bilinear", antialias=True, align_corners=False)
            try:
                with torch.inference_mode():
                    y = network(x, **options)
            except RuntimeError as error:
                raise CheckpointError(f"{file} does not take images [B, 3, 299, 299]; export the network for them") from error
            if not isinstance(y, Tensor) or y.ndim != 2 or len(y) != len(x) or not y.isfinite().all():
                raise CheckpointError(f"{file} does not give finite features [B, d] for B images; export its pooled layer")
            parts.append(y.double().numpy())
        made: Features = np.concatenate(parts)
        return made

    return features, hashlib.sha256(file.read_bytes()).hexdigest()
