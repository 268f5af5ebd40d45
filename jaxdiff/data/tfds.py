"""Any TensorFlow Datasets data set by name or by folder, read without TensorFlow.

The data set must be stored as array_record (`tfds build --file_format=array_record`, or a download by
`download=True`); its records are then random access. tensorflow-datasets is imported only when a source is made.
"""

import difflib
from pathlib import Path
from typing import Any

import numpy as np

from jaxdiff.data.folder import centre_square
from jaxdiff.data.images import Example


class TfdsSource:
    """A source over a TFDS split; make it with `tfds_source`."""

    def __init__(self, records: Any, image: str, label: str | None, size: int | None):
        self._records = records
        self._image = image
        self._label = label
        self._size = size

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        record = self._records[index]
        x0 = np.asarray(record[self._image])
        if self._size is not None:
            x0 = centre_square(x0, size=self._size)
        example: Example = {"x0": x0}
        if self._label is not None:
            example["label"] = np.int32(record[self._label])
        return example


def tfds_source(
    name: str | None = None,
    *,
    split: str,
    directory: str | Path | None = None,
    data_dir: str | Path | None = None,
    download: bool = False,
    image: str = "image",
    label: str | None = "label",
    size: int | None = None,
) -> TfdsSource:
    """A source over one split of a TFDS data set.

    Args:
      name: registered name such as "cifar10" or "imagenet_resized/64x64". Give this or `directory`.
      split: as in TFDS, "train" or "train[:90%]".
      directory: folder of one prepared data set (holds dataset_info.json), registered or not.
      data_dir: where TFDS keeps its data sets; its default if None.
      download: download and prepare the data set if it is not there. Preparing some data sets needs TensorFlow.
      image: name of the feature that is the image, uint8 [H, W, C].
      label: name of the feature that is the class, or None to read no classes.
      size: scale and cut images to size x size as `folder.read_image` does. None when all have one size already.

    Returns:
      Source with x0 uint8 [H, W, C] and, unless label is None, label int32.

    Raises:
      ValueError: for an unknown name, split or feature, a download that fails, data that are not there or not stored as
        array_record, or images of several sizes without `size`.
    """
    if directory is not None and name is None:
        builder, what = _from_directory(_import_tfds(), Path(directory)), str(directory)
    elif name is not None and directory is None:
        builder, what = _by_name(_import_tfds(), name, data_dir), name
        if download:
            _prepare(builder, name)
    else:
        raise ValueError(f"give either a name or a directory, got name={name!r} and directory={directory!r}")
    if not builder.info.splits:
        raise ValueError(f"{what}: not prepared in {builder.data_dir}; prepare it there, or pass download=True")
    _check_features(what, builder.info.features, image, label, size)
    records = _records(builder, what, split)
    return TfdsSource(records, image, label, size)


def _import_tfds() -> Any:
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise ValueError("TFDS data sets need a package that is not installed; pip install 'jaxdiff[tfds]'") from error
    return tensorflow_datasets


def _by_name(tfds: Any, name: str, data_dir: str | Path | None) -> Any:
    try:
        return tfds.builder(name, data_dir=data_dir)
    except (tfds.core.DatasetNotFoundError, ModuleNotFoundError) as error:
        known = tfds.list_builders(with_community_datasets=False)
        close = difflib.get_close_matches(name.split("/")[0].split(":")[0], known, n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "give `directory` for a data set of your own"
        raise ValueError(f"no TFDS data set is called {name!r}; {hint}") from error
    except (ValueError, AssertionError) as error:
        raise ValueError(f"TFDS cannot make {name!r}: {_first_line(error)}; check its config and version") from error


def _prepare(builder: Any, name: str) -> None:
    try:
        builder.download_and_prepare(file_format="array_record")
    # Downloads fail in as many ways as there are hosts, archives and packages that a builder wants.
    except Exception as error:
        raise ValueError(
            f"TFDS could not download or prepare {name!r} ({_first_line(error)}); "
            f"prepare it elsewhere as array_record and copy it to {builder.data_dir}"
        ) from error


def _from_directory(tfds: Any, directory: Path) -> Any:
    if not (directory / "dataset_info.json").is_file():
        raise ValueError(f"{directory}: no dataset_info.json; give the folder of the version, such as .../name/1.0.0")
    try:
        return tfds.builder_from_directory(directory)
    except Exception as error:
        raise ValueError(f"{directory}: TFDS cannot read it ({_first_line(error)}); prepare it again") from error


def _check_features(what: str, features: Any, image: str, label: str | None, size: int | None) -> None:
    for option, feature in (("image", image), ("label", label)):
        if feature is not None and feature not in features:
            raise ValueError(f"{what}: no feature {feature!r}; it has {', '.join(sorted(features))}; set {option}=")
    shape = features[image].shape
    if len(shape) != 3 or np.dtype(features[image].np_dtype) != np.uint8:
        raise ValueError(f"{what}: feature {image!r} must be uint8 [H, W, C], got {features[image]}; set image=")
    if None in shape[:2] and size is None:
        raise ValueError(f"{what}: images differ in size ({shape}); pass size= to scale and cut them")
    if label is not None and (features[label].shape or np.dtype(features[label].np_dtype).kind not in "iu"):
        raise ValueError(f"{what}: feature {label!r} must be one integer, got {features[label]}; set label=None")


def _records(builder: Any, what: str, split: str) -> Any:
    try:
        return builder.as_data_source(split=split)
    except NotImplementedError as error:
        raise ValueError(f"{what}: stored in a format without random access; prepare it as array_record") from error
    except (ValueError, KeyError, AttributeError) as error:
        names = ", ".join(sorted(builder.info.splits))
        raise ValueError(f"{what}: no split {split!r}; it has {names}, and slices such as train[:90%]") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
