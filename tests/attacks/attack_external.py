"""Data files of ONNX models that lie, or lead, where they should not."""

from __future__ import annotations

from pathlib import Path

from attack import WEIGHT, Attack, Build
from attack_models import linear
from onnx import TensorProto


def external(location: str, offset: str = "0", length: str | None = None, place: str = "") -> Build:
    """The weight in a data file: at this location by the model, but really at ``place`` (from the model's folder)."""

    def build(folder: Path) -> Path:
        proto = linear()
        tensor = proto.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        facts = {"location": location.replace("HOME", str(folder)), "offset": offset}
        for key, value in {**facts, **({"length": length} if length else {})}.items():
            tensor.external_data.add(key=key, value=value)
        data = folder / (place or "net.data")
        data.parent.mkdir(parents=True, exist_ok=True)
        data.write_bytes(WEIGHT.tobytes())
        (folder / "model").mkdir(exist_ok=True)
        path = folder / "model" / "net.onnx"
        path.write_bytes(proto.SerializeToString())
        return path

    return build


def linked(folder: Path) -> Path:
    """A data file that is a link to one outside the folder."""
    path = external("net.data", place="secret")(folder)
    (path.parent / "net.data").symlink_to(folder / "secret")
    return path


def in_two_files(folder: Path) -> Path:
    """A location that is a file here and, as Windows reads it, another one in a folder."""
    path = external("data\\net.data", place="model/data/net.data")(folder)
    (path.parent / "data\\net.data").write_bytes(bytes(64))
    return path


OUTSIDE = "lies outside the model's folder"
ATTACKS = [
    Attack("onnx data above its folder", external("../net.data"), refused=OUTSIDE),
    Attack("onnx data at an absolute path", external("HOME/net.data"), refused=OUTSIDE),
    Attack("onnx data above it, by backslashes", external("..\\net.data"), refused=OUTSIDE),
    Attack("onnx data in two files", in_two_files, refused="could lie in two files"),
    Attack("onnx data on a drive", external("C:\\net.data"), refused=OUTSIDE),
    Attack("onnx data above it by way of a folder", external("a/../../net.data"), refused=OUTSIDE),
    Attack("onnx data by a link that leads out", linked, refused=OUTSIDE),
    Attack("onnx data in a device", external("/dev/zero"), refused=OUTSIDE),
    Attack("onnx data without a place", external(""), refused=OUTSIDE),
    Attack("onnx data in a name with NUL", external("net\0.data"), refused=OUTSIDE),
    Attack("onnx data in a folder", external("data", place="model/data/x"), refused="is not a regular file"),
    Attack("onnx data that is missing", external("gone.data"), refused="is missing"),
    Attack(
        "onnx data at a negative offset",
        external("net.data", "-4", place="model/net.data"),
        refused="impossible offset",
    ),
    Attack(
        "onnx data at an offset of 2^62",
        external("net.data", str(2**62), place="model/net.data"),
        refused="ends after",
    ),
    Attack(
        "onnx data at an offset that is no number",
        external("net.data", "abc", place="model/net.data"),
        refused="impossible offset",
    ),
    Attack(
        "onnx data of another length",
        external("net.data", "0", "32", place="model/net.data"),
        refused="32 are declared",
    ),
    Attack("onnx data in the model itself", external("net.onnx"), refused="lies in the model itself"),
]
