"""Write one trained network into every container that spectool reads, small and without local paths."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from torch import Tensor, nn

OPSET = 17


def write_onnx(model: nn.Module, example: Tensor, path: Path) -> None:
    """Export with torch's TorchScript-based exporter, batch norms kept as nodes of their own.

    ``PRESERVE`` on a model in evaluation mode is what keeps them: ``EVAL`` folds them into the convolutions.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (example,),
            path,
            dynamo=False,
            training=torch.onnx.TrainingMode.PRESERVE,
            do_constant_folding=False,
            opset_version=OPSET,
            input_names=["image"],
            output_names=["logits"],
        )


def write_external_onnx(source: Path, path: Path) -> None:
    """Copy an ONNX model with its weights in a second file, ``NAME.onnx.data``."""
    data = path.with_name(path.name + ".data")
    data.unlink(missing_ok=True)  # the writer appends
    options = {"save_as_external_data": True, "location": data.name, "size_threshold": 64}
    onnx.save_model(onnx.load(source), path, **options)


def write_pt2(model: nn.Module, example: Tensor, path: Path) -> None:
    """Save an exported program without the stack traces that name this machine's folders."""
    program = torch.export.export(model, (example,))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    torch.export.save(program, path)


def write_torchscript(model: nn.Module, example: Tensor, path: Path) -> None:
    """Save a traced model without its ``.debug_pkl`` records, which name this machine's folders."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, example)
        torch.jit.save(traced, path)
    reader = torch._C.PyTorchFileReader(str(path))
    kept = {name: reader.get_record(name) for name in reader.get_all_records()}
    del reader
    writer = torch._C.PyTorchFileWriter(str(path))
    for name, data in kept.items():
        if not name.endswith(".debug_pkl") and name not in ("version", "byteorder", ".data/serialization_id"):
            writer.write_record(name, data, len(data))
    writer.write_end_of_file()


def write_sharded(state: Mapping[str, Tensor], folder: Path, limit: int) -> None:
    """Write safetensors shards of at most ``limit`` bytes and the index that Hugging Face readers expect."""
    folder.mkdir(exist_ok=True)
    for stale in folder.glob("model*"):
        stale.unlink()
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in state.items():
        used = sum(t.nbytes for t in shards[-1].values())
        if used and used + tensor.nbytes > limit:
            shards.append({})
        shards[-1][name] = tensor
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    total = sum(tensor.nbytes for tensor in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def parametrised(model: nn.Module, example: Tensor) -> nn.Module:
    """Reparametrise four Linear layers in the four ways torch knows: old and new weight and spectral norm."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the old ones are deprecated, and common in files
        nn.utils.weight_norm(model.fc1)
        nn.utils.spectral_norm(model.fc3)
    nn.utils.parametrizations.weight_norm(model.fc2)
    nn.utils.parametrizations.spectral_norm(model.fc4)
    model.train()
    for _ in range(3):  # a few power iterations, so that u and v are near their fixed points but not on them
        model(example)
    return model.eval()


def write_quantised(weights: list[np.ndarray], path: Path) -> list[np.ndarray]:
    """Write conv – ReLU – conv with int8 weights behind DequantizeLinear; return the dequantised weights.

    The first convolution has one scale per output channel, the second one scale for the whole kernel with a
    zero point that is not zero.
    """
    initializers, nodes, dequantised = [], [], []
    value = "image"
    for number, weight in enumerate(weights, start=1):
        per_channel = number == 1
        axes = (1, 2, 3) if per_channel else None
        scale = np.asarray(np.abs(weight).max(axis=axes) / 100, dtype=np.float32)
        zero = np.zeros(scale.shape, np.int8) if per_channel else np.asarray(5, np.int8)
        spread = (slice(None), None, None, None) if per_channel else ()
        steps = np.clip(np.round(weight / scale[spread]) + zero[spread], -128, 127).astype(np.int8)
        # By ONNX's definition the product is rounded to the scale's type, float32.
        dequantised.append((steps.astype(np.float32) - zero[spread].astype(np.float32)) * scale[spread])
        name = f"conv{number}.weight"
        for suffix, array in (("quantized", steps), ("scale", scale), ("zero_point", zero)):
            initializers.append(numpy_helper.from_array(array, f"{name}_{suffix}"))
        inputs = [f"{name}_{suffix}" for suffix in ("quantized", "scale", "zero_point")]
        nodes.append(helper.make_node("DequantizeLinear", inputs, [f"{name}_dequantized"], axis=0))
        out = f"conv{number}_output"
        inputs = [value, f"{name}_dequantized"]
        nodes.append(helper.make_node("Conv", inputs, [out], pads=[1] * 4, strides=[number] * 2))
        value = f"relu{number}_output" if number < len(weights) else out
        if number < len(weights):
            nodes.append(helper.make_node("Relu", [out], [value]))
    graph = helper.make_graph(
        nodes,
        "quantised_conv",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, [1, weights[-1].shape[0], 4, 4])],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
    onnx.save_model(model, path)
    return dequantised
