"""Element types by one short name, and what each container calls them. No torch here."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

#: Bytes of one element. The names are torch's own, so ``getattr(torch, name)`` is the type.
ITEMSIZE: dict[str, int] = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "int16": 2,
    "uint16": 2,
    "int32": 4,
    "uint32": 4,
    "int64": 8,
    "uint64": 8,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "complex32": 4,
    "complex64": 8,
    "complex128": 16,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "float4_e2m1fn_x2": 1,
    "qint8": 1,
    "quint8": 1,
    "qint32": 4,
    "quint4x2": 1,
    "quint2x4": 1,
}

#: Quantised types are read as the integers they store, ONNX's sub-byte types as the next type that holds them.
STORED_AS: dict[str, str] = {
    "qint8": "int8",
    "quint8": "uint8",
    "qint32": "int32",
    "quint4x2": "uint8",
    "quint2x4": "uint8",
    "uint4": "uint8",
    "int4": "int8",
    "uint2": "uint8",
    "int2": "int8",
    "float4_e2m1": "float32",
}

#: Storage classes of torch pickles, whatever module they are said to live in.
STORAGE_CLASSES: dict[str, str] = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "QInt8Storage": "qint8",
    "QUInt8Storage": "quint8",
    "QInt32Storage": "qint32",
    "QUInt4x2Storage": "quint4x2",
    "QUInt2x4Storage": "quint2x4",
    "UntypedStorage": "uint8",
}

#: Names in safetensors headers. Sub-byte types are missing on purpose: no reader here can use them.
SAFETENSORS: dict[str, str] = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}

#: Bits of one element of the safetensors types that are listed but not read.
SAFETENSORS_PACKED: dict[str, int] = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}

#: ``ScalarType`` numbers of the export schema.
EXPORTED: dict[int, str] = {
    1: "uint8",
    2: "int8",
    3: "int16",
    4: "int32",
    5: "int64",
    6: "float16",
    7: "float32",
    8: "float64",
    9: "complex32",
    10: "complex64",
    11: "complex128",
    12: "bool",
    13: "bfloat16",
    28: "uint16",
    29: "float8_e4m3fn",
    30: "float8_e5m2",
    31: "float8_e4m3fnuz",
    32: "float8_e5m2fnuz",
    33: "float8_e8m0fnu",
    34: "uint32",
    35: "uint64",
}

#: Bits of one element of ONNX's packed types.
ONNX_BITS: dict[str, int] = {"uint4": 4, "int4": 4, "float4_e2m1": 4, "uint2": 2, "int2": 2}

#: ``TensorProto.DataType`` numbers; 8 is strings.
ONNX: dict[int, str] = {
    1: "float32",
    2: "uint8",
    3: "int8",
    4: "uint16",
    5: "int16",
    6: "int32",
    7: "int64",
    9: "bool",
    10: "float16",
    11: "float64",
    12: "uint32",
    13: "uint64",
    14: "complex64",
    15: "complex128",
    16: "bfloat16",
    17: "float8_e4m3fn",
    18: "float8_e4m3fnuz",
    19: "float8_e5m2",
    20: "float8_e5m2fnuz",
    24: "float8_e8m0fnu",
    21: "uint4",
    22: "int4",
    23: "float4_e2m1",
    25: "uint2",
    26: "int2",
}

#: Array type strings of numpy, without their byte order.
NUMPY: dict[str, str] = {
    "b1": "bool",
    "u1": "uint8",
    "i1": "int8",
    "u2": "uint16",
    "i2": "int16",
    "u4": "uint32",
    "i4": "int32",
    "u8": "uint64",
    "i8": "int64",
    "f2": "float16",
    "f4": "float32",
    "f8": "float64",
    "c8": "complex64",
    "c16": "complex128",
}


def unit(name: str) -> int:
    """Return how many bytes of type ``name`` keep together when the byte order changes."""
    return ITEMSIZE[name] // (2 if name.startswith("complex") else 1)


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch type that tensors of type ``name`` are read as.

    Raises:
        KeyError: If the installed torch has no such type.
    """
    import torch

    dtype = getattr(torch, STORED_AS.get(name, name), None)
    if not isinstance(dtype, torch.dtype):
        raise KeyError(name)
    return dtype
