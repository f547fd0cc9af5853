"""The image sets, held as bytes in the memory of the device that trains; a step gathers its images there and scales
them to [0, 1]. So nothing crosses from host to GPU but the order of the images, once per epoch, and there is no loader
to wait for and nothing to pin. The largest set has 225 MB.
"""

from __future__ import annotations

import gzip
import math
import os
import pathlib
import struct
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import UsageError, require

DEBIAN_FASHION_MNIST = pathlib.Path("/usr/share/datasets/fashion-mnist")
IDX_BYTES = 0x08  # the type code of unsigned bytes in an IDX header


class Images(NamedTuple):
    """images [N, C, H, W], bytes from 0 to `maximum`; labels [N], from 0 to classes - 1."""

    images: Tensor
    labels: Tensor
    classes: int
    maximum: int

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Images x in [0, 1] (float32) and labels at `index`."""
        return self.images[index].to(torch.float32).div_(self.maximum), self.labels[index]

    def to(self, device: torch.device) -> Images:
        return self._replace(images=self.images.to(device), labels=self.labels.to(device))


def load(dataset: str, split: str = "train", folder: str | None = None, limit: int | None = None) -> Images:
    """A split of a data set. Nothing is padded: the network takes images of any size.

    Args:
        dataset: "digits", "fashion-mnist", "cifar10" or "svhn".
        split: "train" or "test".
        folder: where its files lie; without it the usual place (fashion-mnist) or a cache that is filled by
            downloading (cifar10, svhn). digits needs no files.
        limit: keep the first `limit` images.

    Raises:
        UsageError: files that are missing or damaged, saying what was looked for, where, and how to get it.
    """
    data = LOADERS[dataset](split, pathlib.Path(folder).expanduser() if folder else None)
    if limit is not None:
        data = data._replace(images=data.images[:limit].clone(), labels=data.labels[:limit].clone())
    return data


def digits(split: str, folder: pathlib.Path | None) -> Images:
    """1,797 handwritten digits of 8 x 8 pixels that come with scikit-learn. They have no test split."""
    if split != "train":
        raise UsageError("digits has no test split; leave out --evaluate or choose another --dataset")
    found = require("sklearn.datasets").load_digits()
    images = torch.from_numpy(found.images).to(torch.uint8)[:, None]
    return Images(images, torch.from_numpy(found.target).to(torch.int64), classes=10, maximum=16)


def fashion_mnist(split: str, folder: pathlib.Path | None) -> Images:
    """60,000 (test: 10,000) images of 28 x 28 pixels in IDX files, gzipped or plain."""
    folder, prefix = folder or DEBIAN_FASHION_MNIST, "train" if split == "train" else "t10k"
    names = (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte")
    images, labels = (read_idx(find(folder, name)) for name in names)
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise UsageError(
            f"{folder}: {names[0]} holds {list(images.shape)}, {names[1]} {list(labels.shape)}; expected [N, H, W], [N]"
        )
    return Images(images[:, None], labels.to(torch.int64), classes=10, maximum=255)


def find(folder: pathlib.Path, name: str) -> pathlib.Path:
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    raise UsageError(
        f"fashion-mnist: neither {name}.gz nor {name} is in {folder}; `apt-get install dataset-fashion-mnist` puts "
        f"them into {DEBIAN_FASHION_MNIST}, or give the folder that has them as --data"
    )


def read_idx(path: pathlib.Path) -> Tensor:
    """An IDX file of bytes: 0 0 type rank, the sizes as big-endian 32-bit integers, then the bytes."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read()
        zero, kind, rank = struct.unpack_from(">HBB", content)
        shape = struct.unpack_from(f">{rank}I", content, 4)
    except (OSError, EOFError, struct.error, zlib.error) as error:
        raise UsageError(f"{path} cannot be read as an IDX file: {error}") from error
    if (zero, kind) != (0, IDX_BYTES) or len(content) != 4 + 4 * rank + math.prod(shape):
        raise UsageError(f"{path} is no complete IDX file of bytes: header {content[:4].hex()}, {len(content)} bytes")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=4 + 4 * rank).reshape(shape)


def cifar10(split: str, folder: pathlib.Path | None) -> Images:
    """50,000 (test: 10,000) images of 3 x 32 x 32."""
    found = torchvision_set("CIFAR10", "cifar-10-batches-py", folder, train=split == "train")
    images = torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous()
    return Images(images, torch.tensor(found.targets), classes=10, maximum=255)


def svhn(split: str, folder: pathlib.Path | None) -> Images:
    """73,257 (test: 26,032) house numbers of 3 x 32 x 32."""
    require("scipy.io")  # torchvision reads the .mat files with it
    found = torchvision_set("SVHN", f"{split}_32x32.mat", folder, split=split)
    return Images(torch.from_numpy(found.data), torch.from_numpy(found.labels), classes=10, maximum=255)


def torchvision_set(name: str, files: str, folder: pathlib.Path | None, **split: Any) -> Any:
    """torchvision's reader on the given folder, or on a cache folder that it may download into."""
    reader = getattr(require("torchvision.datasets", "vision"), name)
    root = folder or cache() / name.lower()
    try:
        return reader(str(root), download=False, **split)
    except RuntimeError as error:  # absent, or its checksum is wrong
        missing = f"{name.lower()}: {files} is not in {root} or is damaged"
        source = getattr(reader, "url", None) or reader.split_list[split["split"]][0]
        advice = f"get it from {source}, unpack it where it is an archive, and give its folder as --data"
        if folder:
            raise UsageError(f"{missing}; {advice}") from error
    try:
        root.mkdir(parents=True, exist_ok=True)
        return reader(str(root), download=True, **split)
    except (OSError, RuntimeError) as error:
        raise UsageError(f"{missing} and could not be downloaded ({error}); {advice}") from error


def cache() -> pathlib.Path:
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dnl_kernels" / "datasets"


LOADERS: dict[str, Callable[[str, pathlib.Path | None], Images]] = {
    "digits": digits,
    "fashion-mnist": fashion_mnist,
    "cifar10": cifar10,
    "svhn": svhn,
}
