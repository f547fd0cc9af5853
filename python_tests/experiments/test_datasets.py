"""The readers of dnl_kernels.experiments.data, on small files in the true formats."""

import gzip
import hashlib
import io
import pickle
import struct

import numpy as np
import pytest
import torch

from dnl_kernels.experiments import data
from dnl_kernels.experiments.errors import UsageError


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 0x08, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (6, 3, 32, 32), dtype=np.uint8)


@pytest.fixture
def labels():
    return np.array([3, 1, 4, 1, 5, 9], dtype=np.uint8)


@pytest.fixture
def fashion(tmp_path, pixels, labels):
    """The four files of Fashion-MNIST: train gzipped as Debian has them, test plain."""
    images = pixels[:, 0, :28, :28]
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(images[::-1].copy()))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(labels[::-1].copy()))
    return tmp_path


@pytest.fixture
def cifar(tmp_path, monkeypatch, pixels, labels):
    """CIFAR-10's pickled batches; the published checksums are replaced by those of these files."""
    datasets = pytest.importorskip("torchvision.datasets")
    folder = tmp_path / datasets.CIFAR10.base_folder
    folder.mkdir()

    def store(name, content):
        encoded = pickle.dumps(content, protocol=2)
        (folder / name).write_bytes(encoded)
        return [name, hashlib.md5(encoded).hexdigest()]

    def batch(name, slice):
        return store(name, {"data": pixels[slice].reshape(-1, 3072), "labels": labels[slice].tolist()})

    train = [batch(f"data_batch_{i}", slice(i - 1, i)) for i in range(1, 6)]
    monkeypatch.setattr(datasets.CIFAR10, "train_list", train)
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [batch("test_batch", slice(5, 6))])
    name, md5 = store("batches.meta", {"label_names": [str(i) for i in range(10)]})
    monkeypatch.setattr(datasets.CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": md5})
    return tmp_path


@pytest.fixture
def svhn(tmp_path, monkeypatch, pixels, labels):
    """SVHN's MATLAB files [H, W, C, N] with the digit 0 labelled 10."""
    datasets = pytest.importorskip("torchvision.datasets")
    loaded = {}
    for split in ("train", "test"):
        buffer = io.BytesIO()
        marked = np.where(labels == 9, 10, labels)[:, None]
        pytest.importorskip("scipy.io").savemat(buffer, {"X": pixels.transpose(2, 3, 1, 0), "y": marked})
        (tmp_path / f"{split}_32x32.mat").write_bytes(buffer.getvalue())
        md5 = hashlib.md5(buffer.getvalue()).hexdigest()
        loaded[split] = [f"nowhere://{split}", f"{split}_32x32.mat", md5]
    monkeypatch.setattr(datasets.SVHN, "split_list", loaded)
    return tmp_path


def test_digits_are_the_whole_set():
    found = data.load("digits")
    assert found.images.shape == (1797, 1, 8, 8) and found.images.dtype == torch.uint8
    assert found.labels.unique().tolist() == list(range(found.classes))
    x, labels = found.batch(torch.arange(1797))
    assert (x.min(), x.max(), x.dtype) == (0, 1, torch.float32) and labels.dtype == torch.int64


def test_digits_have_no_test_split():
    with pytest.raises(UsageError, match="digits has no test split"):
        data.load("digits", "test")


def test_limit_keeps_the_first_images():
    assert torch.equal(data.load("digits", limit=10).images, data.load("digits").images[:10])


def test_fashion_mnist_is_read(fashion, pixels, labels):
    found = data.load("fashion-mnist", "train", str(fashion))
    assert torch.equal(found.images, torch.from_numpy(pixels[:, :1, :28, :28]))
    assert found.labels.tolist() == labels.tolist()


def test_fashion_mnist_reads_plain_files_too(fashion, labels):
    assert data.load("fashion-mnist", "test", str(fashion)).labels.tolist() == labels[::-1].tolist()


@pytest.mark.parametrize(
    "content, message",
    [
        (b"no gzip at all", "Not a gzipped file"),
        (gzip.compress(b"\0\0\x08")[:-3], "cannot be read"),
        (gzip.compress(idx(np.zeros((2, 2, 2), np.uint8)))[:-9], "cannot be read"),
        (gzip.compress(idx(np.zeros((2, 2, 2), np.uint8))[:-1]), "no complete IDX file"),
        (gzip.compress(b"\0\0\x0d\x01" + bytes(8)), "no complete IDX file"),
        (gzip.compress(idx(np.zeros((5, 28, 28), np.uint8))), r"holds \[5, 28, 28\], .* \[6\]"),
    ],
    ids=["not gzip", "header", "cut", "short", "float", "count"],
)
def test_damaged_idx_files_are_named(fashion, content, message):
    (fashion / "train-images-idx3-ubyte.gz").write_bytes(content)
    with pytest.raises(UsageError, match=message) as error:
        data.load("fashion-mnist", "train", str(fashion))
    assert str(fashion) in str(error.value)


def test_cifar10_is_read(cifar, pixels, labels):
    found = data.load("cifar10", "train", str(cifar))
    assert torch.equal(found.images, torch.from_numpy(pixels[:5])) and found.labels.tolist() == labels[:5].tolist()
    assert torch.equal(data.load("cifar10", "test", str(cifar)).images, torch.from_numpy(pixels[5:]))


def test_a_wrong_checksum_is_refused(cifar):
    path = cifar / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(path.read_bytes() + b"!")
    with pytest.raises(
        UsageError, match="cifar10: cifar-10-batches-py is not in .* or is damaged; get it from https://"
    ):
        data.load("cifar10", "train", str(cifar))


def test_svhn_is_read_and_10_means_0(svhn, pixels):
    found = data.load("svhn", "train", str(svhn))
    assert torch.equal(found.images, torch.from_numpy(pixels)) and found.labels.tolist() == [3, 1, 4, 1, 5, 0]


@pytest.mark.parametrize(
    "dataset, file, source",
    [
        ("fashion-mnist", "train-images-idx3-ubyte.gz", "apt-get install dataset-fashion-mnist"),
        ("cifar10", "cifar-10-batches-py", "cs.toronto.edu"),
        ("svhn", "train_32x32.mat", "ufldl.stanford.edu"),
    ],
)
def test_a_missing_file_says_what_where_and_how(tmp_path, dataset, file, source):
    with pytest.raises(UsageError) as error:
        data.load(dataset, "train", str(tmp_path))
    message = str(error.value)
    assert all(part in message for part in (dataset, file, str(tmp_path), source)) and "\n" not in message


def test_a_failed_download_says_so(tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets")

    class Offline(datasets.CIFAR10):
        def download(self):
            raise OSError("no route to host")

    monkeypatch.setattr(datasets, "CIFAR10", Offline)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UsageError, match="could not be downloaded .no route to host."):
        data.load("cifar10")
