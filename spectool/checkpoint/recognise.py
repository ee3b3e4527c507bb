"""Say what a file that is no checkpoint looks like, and what to do."""

from __future__ import annotations

import contextlib
import pickletools
import warnings
from collections.abc import Iterable

from spectool.checkpoint.source import Source
from spectool.errors import CorruptFile, UnrecognisedFormat

_SAVE = "load it where it was made and save model.state_dict() with torch.save"
_EXPORT = "convert it to safetensors or ONNX with its own library"
_UNPACK = "unpack it and name the checkpoint inside"
_AGAIN = "download it again: this is not the file itself"

#: Position, bytes, what that is, what to do. First match counts.
_SIGNATURES: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"version https://git-lfs", "a Git LFS pointer, not the file it stands for", "run git lfs pull"),
    (0, b"\x1f\x8b", "a gzip file inside a gzip file", _UNPACK),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras?)", _EXPORT),
    (0, b"\x93NUMPY", "a numpy array", "save it with safetensors, under a name"),
    (0, b"GGUF", "a GGUF file (llama.cpp)", "name the safetensors file it was made from"),
    (0, b"ggml", "a GGML file", "name the safetensors file it was made from"),
    (4, b"TFL3", "a TensorFlow Lite model", _EXPORT),
    (0, b"sys_info\0", "a torch file of 2016 (a tar archive)", "load it with torch.load and save it again"),
    (257, b"ustar", "a tar archive", _UNPACK),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", _UNPACK),
    (0, b"Rar!", "a RAR archive", _UNPACK),
    (0, b"\xfd7zXZ", "an xz file", _UNPACK),
    (0, b"BZh", "a bzip2 file", _UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "a zstd file", _UNPACK),
    (0, b"PK\5\6", "an empty zip archive", "save the checkpoint again"),
    (0, b"%PDF", "a PDF document", "name a checkpoint"),
    (0, b"\x89PNG", "a picture", "name a checkpoint"),
    (0, b"\xff\xd8\xff", "a picture", "name a checkpoint"),
    (0, b"\x7fELF", "a program or shared library", "name a checkpoint"),
    (0, b"\x78\x9c", "zlib-compressed data (a joblib dump?)", _SAVE),
    (0, b"\x78\x01", "zlib-compressed data (a joblib dump?)", _SAVE),
    (0, b"\x78\xda", "zlib-compressed data (a joblib dump?)", _SAVE),
)

#: Prefix of a class in a pickle → what wrote it.
_PICKLED = (
    ("pandas.", "a pandas pickle", "it holds a table, not a network: name a checkpoint"),
    ("joblib.", "a joblib pickle", _SAVE),
    ("sklearn.", "a scikit-learn pickle", "scikit-learn models have no torch weights: name a checkpoint"),
    ("torch", "a plain pickle of torch objects", _SAVE),
    ("numpy", "a plain pickle of numpy arrays", "save the arrays with safetensors, under names"),
    ("paddle", "a Paddle pickle", _EXPORT),
)

#: Names of zip members → what the archive is.
_ZIPPED = (
    ((".npy",), "a numpy .npz archive", "save the arrays with safetensors, under names"),
    ((".weights.h5", ".h5"), "a Keras archive", _EXPORT),
    (("saved_model.pb", ".pb"), "a TensorFlow model", _EXPORT),
    (("[Content_Types].xml",), "an Office document", "name a checkpoint"),
    ((".pt", ".pth", ".ckpt", ".safetensors", ".onnx", ".bin"), "a zip archive around a checkpoint", _UNPACK),
)


def refuse(source: Source) -> UnrecognisedFormat | CorruptFile:
    """Return the error for a file that is no container spectool knows."""
    path = source.path
    if source.size == 0:
        return CorruptFile(f"{path} is empty", hint="copy or download it again")
    head = source.head(4096)
    for position, signature, what, hint in _SIGNATURES:
        if head[position : position + len(signature)] == signature:
            return UnrecognisedFormat(f"{path} is {what}", hint=hint)
    if is_tar(head):
        return UnrecognisedFormat(f"{path} is a tar archive", hint=_UNPACK)
    if head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return _pickle(source, head)
    return _text(source, head)


def refuse_zip(source: Source, names: Iterable[str]) -> UnrecognisedFormat:
    """Return the error for a zip archive that torch did not write."""
    listed = list(names)
    for suffixes, what, hint in _ZIPPED:
        if any(name.endswith(suffixes) for name in listed):
            return UnrecognisedFormat(f"{source.path} is {what}", hint=hint)
    return UnrecognisedFormat(f"{source.path} is a zip archive, but not one that torch wrote", hint=_UNPACK)


def is_tar(head: bytes) -> bool:
    """Tell a tar header without a magic number by its octal checksum."""
    if len(head) < 512:
        return False
    field = head[148:156].strip(b" \0")
    block = head[:148] + b" " * 8 + head[156:512]
    try:
        return bool(field) and int(field, 8) == sum(block)
    except ValueError:
        return False


def _pickle(source: Source, head: bytes) -> UnrecognisedFormat:
    names = []
    texts: list[str] = []
    # The head ends in the middle of an opcode; what was seen by then is enough.
    with contextlib.suppress(ValueError), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for opcode, argument, _ in pickletools.genops(head):
            if opcode.name == "GLOBAL":
                names.append(str(argument).replace(" ", ".", 1))
            elif opcode.name == "STACK_GLOBAL":
                names.append(".".join(texts[-2:]))
            elif isinstance(argument, str):
                texts.append(argument)
    for prefix, what, hint in _PICKLED:
        if any(name.startswith(prefix) for name in names):
            return UnrecognisedFormat(f"{source.path} is {what}, not a checkpoint of torch.save", hint=hint)
    first = f" (of {names[0][:60]})" if names else ""
    return UnrecognisedFormat(
        f"{source.path} is a plain pickle{first}, not a checkpoint of torch.save", hint=_SAVE
    )


def _text(source: Source, head: bytes) -> UnrecognisedFormat | CorruptFile:
    path = source.path
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:64].lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head")):
        return UnrecognisedFormat(
            f"{path} is a web page", hint="download the file itself: use its raw or resolve link"
        )
    if start.startswith(b"<"):
        return UnrecognisedFormat(f"{path} is an XML or HTML text", hint=_AGAIN)
    if start.startswith((b"{", b"[")):
        return UnrecognisedFormat(
            f"{path} is a JSON text, but no shard index", hint="name the file with the weights"
        )
    if head.isascii() and not any(octet < 32 and octet not in b"\t\n\r\f" for octet in head):
        size = f"of {source.size} bytes " if source.size < 64 else ""
        return UnrecognisedFormat(f"{path} is a text {size}and no checkpoint", hint="name a checkpoint file")
    return UnrecognisedFormat(
        f"{path} is none of the formats spectool reads (it begins with {head[:8].hex(' ')})",
        hint="torch.save, TorchScript, .pt2, safetensors and ONNX are read",
    )
