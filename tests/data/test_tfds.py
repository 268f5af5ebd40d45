"""tensorflow-datasets for real: a data set that the test prepares on disk, read back without TensorFlow."""

import io
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from jaxdiff.data.pipeline import batches
from jaxdiff.data.tfds import tfds_source

IMAGES = np.random.default_rng(0).integers(0, 256, (12, 6, 8, 3), dtype=np.uint8)


class Speckles(tfds.core.GeneratorBasedBuilder):
    """Twelve random images of 6 x 8 pixels in four classes; `free` says that their size is not fixed."""

    # TFDS looks for the package of a module with dots in its name, and needs importlib_resources to do so.
    __module__ = "speckles"
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(6, 8, 3)),
            "free": tfds.features.Image(shape=(None, None, 1)),
            "label": tfds.features.ClassLabel(num_classes=4),
            "weight": tfds.features.Scalar(dtype=np.float32),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(range(8)), "test": self._generate_examples(range(8, 12))}

    def _generate_examples(self, rows):
        for i in rows:
            grey = Image.fromarray(IMAGES[i, :, :, 0]).resize((8 + i, 6 + i))
            # Encoded bytes: given pixels, TFDS would want TensorFlow to encode them.
            yield i, {"image": png(Image.fromarray(IMAGES[i])), "free": png(grey), "label": i % 4, "weight": 0.5}


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    file.seek(0)
    return file


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("tfds")
    Speckles(data_dir=path, file_format="array_record").download_and_prepare()
    return path


@pytest.fixture(scope="module")
def directory(data_dir):
    return data_dir / "speckles" / "1.0.0"


def by_pixels(source):
    """{index into IMAGES: label} of every example, which must be one of IMAGES exactly."""
    found = {}
    for i in range(len(source)):
        (row,) = np.flatnonzero((IMAGES == source[i]["x0"]).all((1, 2, 3)))
        found[int(row)] = int(source[i]["label"])
    return found


def test_reads_exactly_what_was_stored(directory):
    assert by_pixels(tfds_source(directory=directory, split="train")) == {i: i % 4 for i in range(8)}
    assert by_pixels(tfds_source(directory=directory, split="test")) == {i: i % 4 for i in range(8, 12)}
    assert len(tfds_source(directory=directory, split="train[:25%]+test")) == 6


def test_reads_by_name(data_dir):
    source = tfds_source("speckles", data_dir=data_dir, split="train")
    assert by_pixels(source) == {i: i % 4 for i in range(8)}
    assert source[0]["x0"].dtype == np.uint8 and source[0]["label"].dtype == np.int32


def test_goes_through_the_pipeline(directory):
    stream = batches(tfds_source(directory=directory, split="train"), batch_size=4, seed=0)
    first, second = next(stream), next(stream)
    assert first["x0"].shape == (4, 6, 8, 3) and first["x0"].dtype == np.float32
    seen = np.sort(np.concatenate([first["x0"], second["x0"]]).reshape(8, -1).sum(1))
    stored = np.sort((IMAGES[:8].astype(np.float32) / 127.5 - 1).reshape(8, -1).sum(1))
    assert np.allclose(seen, stored, atol=1e-3)


def test_other_features_and_sizes(directory):
    source = tfds_source(directory=directory, split="test", image="free", label=None, size=4)
    assert source[0]["x0"].shape == (4, 4, 1) and set(source[0]) == {"x0"}


def test_tensorflow_is_not_imported(directory):
    assert len(tfds_source(directory=directory, split="train")[0]["x0"]) == 6
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "valid"}, "no split 'valid'; it has test, train"),
        ({"split": "train[:x%]"}, "no split 'train\\[:x%\\]'"),
        ({"split": "train", "image": "img"}, "no feature 'img'; it has free, image, label, weight; set image="),
        ({"split": "train", "label": "class"}, "no feature 'class'.*set label="),
        ({"split": "train", "image": "label"}, "feature 'label' must be uint8"),
        ({"split": "train", "label": "weight"}, "feature 'weight' must be one integer"),
        ({"split": "train", "image": "free"}, "images differ in size .* pass size="),
    ],
)
def test_wrong_options_are_refused(directory, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        tfds_source(directory=directory, **options)
    assert "\n" not in str(caught.value)


def test_unknown_names_get_a_hint(tmp_path):
    with pytest.raises(ValueError, match="no TFDS data set is called 'cifr10'; did you mean cifar10"):
        tfds_source("cifr10", split="train", data_dir=tmp_path)
    with pytest.raises(ValueError, match="TFDS cannot make 'mnist:9.9.9'.*check its config and version"):
        tfds_source("mnist:9.9.9", split="train", data_dir=tmp_path)


def test_data_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(ValueError, match="cifar10: not prepared in .*pass download=True"):
        tfds_source("cifar10", split="train", data_dir=tmp_path)
    with pytest.raises(ValueError, match="no dataset_info.json; give the folder of the version"):
        tfds_source(directory=tmp_path, split="train")
    with pytest.raises(ValueError, match="give either a name or a directory"):
        tfds_source(split="train")


def test_damaged_info_is_refused(tmp_path):
    (tmp_path / "dataset_info.json").write_text("{not json")
    with pytest.raises(ValueError, match="TFDS cannot read it"):
        tfds_source(directory=tmp_path, split="train")
