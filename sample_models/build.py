"""Train the sample networks, write every sample file and their dense truth.

Run ``python sample_models/build.py``; it needs scikit-learn for its bundled digits, and SciPy. Seeds are
fixed: on one machine and one set of versions a rebuild gives the same bytes (the legacy file apart, whose
storages go by their memory address). On another processor the last bits of the weights may differ, and
``expected.json`` with them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from containers import (
    parametrised,
    write_external_onnx,
    write_onnx,
    write_pt2,
    write_quantised,
    write_sharded,
    write_torchscript,
)
from nets import DigitsCNN, DigitsMLP, digits_sequential
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from truth import (
    Row,
    cnn_module,
    cnn_program,
    cnn_tensors,
    matrix_row,
    measured,
    mlp_program,
    mlp_tensors,
    sequential_program,
)

HERE = Path(__file__).parent
Answers = dict[str, list[Row]]


def digits() -> tuple[Tensor, Tensor]:
    """Return images ``(1797, 1, 8, 8)`` in [0, 1] and labels."""
    data = load_digits()
    images = torch.tensor(data.images / 16, dtype=torch.float32).unsqueeze(1)
    return images, torch.tensor(data.target)


def train(make: Callable[[], nn.Module], images: Tensor, labels: Tensor, seed: int) -> tuple[nn.Module, dict]:
    """Train with SGD; return the model in evaluation mode and a checkpoint as training scripts write them."""
    torch.manual_seed(seed)
    model = make()
    order = torch.randperm(len(images))
    train_set, test_set = order[:1437], order[1437:]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    epochs = 15
    for _ in range(epochs):
        model.train()
        for batch in train_set[torch.randperm(len(train_set))].split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        accuracy = (model(images[test_set]).argmax(1) == labels[test_set]).float().mean().item()
    print(f"{type(model).__name__}: test accuracy {accuracy:.3f}")
    checkpoint = {
        "epoch": epochs,
        "arch": type(model).__name__,
        "state_dict": {f"module.{name}": tensor for name, tensor in model.state_dict().items()},
        "best_acc1": accuracy,
        "optimizer": optimizer.state_dict(),
    }
    return model, checkpoint


def write_cnn(images: Tensor, labels: Tensor) -> Answers:
    """Write the CNN into every container."""
    large = images.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    model, checkpoint = train(DigitsCNN, large, labels, seed=1)
    state = model.state_dict()
    torch.save(state, HERE / "digits_cnn_state.pt")
    torch.save(checkpoint, HERE / "digits_cnn_training.pt")
    torch.save(model, HERE / "digits_cnn_module.pt")
    torch.save(state, HERE / "digits_cnn_legacy.pt", _use_new_zipfile_serialization=False)
    save_file(state, HERE / "digits_cnn.safetensors", metadata={"format": "pt"})
    example = large[:1].clone()  # a view would drag its whole storage into the file
    write_onnx(model, example, HERE / "digits_cnn.onnx")
    write_external_onnx(HERE / "digits_cnn.onnx", HERE / "digits_cnn_external.onnx")
    write_pt2(model, example, HERE / "digits_cnn.pt2")
    write_torchscript(model, example, HERE / "digits_cnn_torchscript.pt")
    sequential, _ = train(digits_sequential, large, labels, seed=3)
    torch.save(sequential, HERE / "digits_sequential_module.pt")
    return {
        "cnn program": cnn_program(state),
        "cnn onnx": cnn_program(state, eps=float(np.float32(1e-5))),
        "cnn tensors": cnn_tensors(state),
        "cnn module": cnn_module(state),
        "sequential program": sequential_program(sequential.state_dict()),
    }


def write_mlp(images: Tensor, labels: Tensor) -> Answers:
    """Write the MLP: plain, sharded, as ONNX, in bfloat16 and reparametrised."""
    flat = images.flatten(1)
    model, _ = train(DigitsMLP, flat, labels, seed=2)
    state = model.state_dict()
    torch.save(state, HERE / "digits_mlp_state.pt")
    write_sharded(state, HERE / "digits_mlp_sharded", limit=13_000)
    write_onnx(model, flat[:1].clone(), HERE / "digits_mlp.onnx")
    half = {name: tensor.bfloat16() for name, tensor in state.items()}
    save_file(half, HERE / "digits_mlp_bf16.safetensors", metadata={"format": "pt"})
    answers = {
        "mlp program": mlp_program(state),
        "mlp tensors": mlp_tensors(state),
        "mlp bf16": mlp_tensors(half),
    }
    torch.manual_seed(4)
    reparametrised = parametrised(model, flat[:8])
    torch.save(reparametrised.state_dict(), HERE / "digits_mlp_weightnorm.pt")
    matrices = {
        "fc1.weight": ("fc1.weight_g", "fc1.weight_v"),
        "fc2.weight": ("fc2.parametrizations.weight.original0", "fc2.parametrizations.weight.original1"),
        "fc3.weight": ("fc3.weight_orig",),
        "fc4.weight": ("fc4.parametrizations.weight.original",),
    }
    effective = effective_weights(reparametrised.state_dict())
    answers["mlp reparametrised"] = [
        matrix_row(name, effective[name], "linear", *parts) for name, parts in matrices.items()
    ]
    return answers


def effective_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the four matrices that ``digits_mlp_weightnorm.pt`` stands for, in float64."""
    state = {name: tensor.double() for name, tensor in state.items()}

    def weight_norm(g: Tensor, v: Tensor) -> Tensor:
        return g * v / v.norm(dim=1, keepdim=True)

    def spectral_norm(w: Tensor, u: Tensor, v: Tensor) -> Tensor:
        return w / (u @ w @ v)

    new = "parametrizations.weight"
    return {
        "fc1.weight": weight_norm(state["fc1.weight_g"], state["fc1.weight_v"]),
        "fc2.weight": weight_norm(state[f"fc2.{new}.original0"], state[f"fc2.{new}.original1"]),
        "fc3.weight": spectral_norm(state["fc3.weight_orig"], state["fc3.weight_u"], state["fc3.weight_v"]),
        "fc4.weight": spectral_norm(
            state[f"fc4.{new}.original"], state[f"fc4.{new}.0._u"], state[f"fc4.{new}.0._v"]
        ),
    }


def write_small() -> Answers:
    """Write the hand-made files: int8 convolutions and a LoRA pair."""
    rng = np.random.default_rng(5)
    weights = [rng.normal(size=(6, 3, 3, 3)), rng.normal(size=(4, 6, 3, 3))]
    kernels = write_quantised(weights, HERE / "quantised_conv.onnx")
    shapes = ((3, 8, 8), (6, 8, 8))
    quantised = []
    for number, (kernel, in_shape) in enumerate(zip(kernels, shapes, strict=True), start=1):
        weight = torch.from_numpy(kernel).double()

        def convolve(x: Tensor, weight: Tensor = weight, stride: int = number) -> Tensor:
            return F.conv2d(x, weight, padding=1, stride=stride)

        quantised.append(measured(f"conv{number}.weight_quantized", convolve, in_shape, kind="conv2d"))
    prefix = "base_model.model.layers.0.self_attn"
    config = {"r": 4, "lora_alpha": 16, "peft_type": "LORA", "target_modules": ["q_proj", "v_proj"]}
    tensors, lora = {}, []
    for name, outputs in (("q_proj", 40), ("v_proj", 24)):
        down, up = f"{prefix}.{name}.lora_A.weight", f"{prefix}.{name}.lora_B.weight"
        tensors[down] = torch.from_numpy(rng.normal(size=(4, 32)).astype(np.float32)) / 8
        tensors[up] = torch.from_numpy(rng.normal(size=(outputs, 4)).astype(np.float32)) / 8
        product = tensors[up].double() @ tensors[down].double() * (16 / 4)
        lora.append(matrix_row(up, product, "lora", down, up))
    metadata = {"lora_adapter_metadata": json.dumps(config)}
    save_file(tensors, HERE / "lora_pair.safetensors", metadata=metadata)
    return {"quantised": quantised, "lora": lora}


# File → (options of the inspection, which answers hold). Options are those of ``spectool.inspect``.
FILES: dict[str, tuple[dict[str, object], str]] = {
    "digits_cnn_state.pt": ({}, "cnn tensors"),
    "digits_cnn_training.pt": ({}, "cnn tensors"),
    "digits_cnn_legacy.pt": ({}, "cnn tensors"),
    "digits_cnn.safetensors": ({}, "cnn tensors"),
    "digits_cnn_module.pt": ({}, "cnn module"),
    "digits_cnn.onnx": ({}, "cnn onnx"),
    "digits_cnn_external.onnx": ({}, "cnn onnx"),
    "digits_cnn.pt2": ({}, "cnn program"),
    "digits_cnn_torchscript.pt": ({"input_shape": [1, 1, 16, 16]}, "cnn program"),
    "digits_sequential_module.pt": ({"input_shape": [1, 1, 16, 16]}, "sequential program"),
    "digits_mlp_state.pt": ({}, "mlp tensors"),
    "digits_mlp_sharded": ({}, "mlp tensors"),
    "digits_mlp.onnx": ({}, "mlp program"),
    "digits_mlp_bf16.safetensors": ({}, "mlp bf16"),
    "digits_mlp_weightnorm.pt": ({}, "mlp reparametrised"),
    "quantised_conv.onnx": ({}, "quantised"),
    "lora_pair.safetensors": ({}, "lora"),
}
# What stands before every key of the answers in a file.
PREFIXES = {"digits_cnn_training.pt": "module."}


def main() -> None:
    """Rebuild everything beside this file."""
    torch.set_num_threads(1)  # the order of float32 sums, and so the bytes, depend on it
    torch.use_deterministic_algorithms(True)
    images, labels = digits()
    answers = {**write_cnn(images, labels), **write_mlp(images, labels), **write_small()}
    document = {
        "files": {
            name: {"options": options, "answers": key, "prefix": PREFIXES.get(name, "")}
            for name, (options, key) in FILES.items()
        },
        "answers": {key: [row.plain() for row in rows] for key, rows in answers.items()},
    }
    for file in (*HERE.glob("*.safetensors"), *HERE.glob("*/*.safetensors"), *HERE.glob("*.data")):
        file.chmod(0o644)  # their writers leave them readable to the owner only
    (HERE / "expected.json").write_text(json.dumps(document, indent=1) + "\n")
    print(f"{sum(len(rows) for rows in answers.values())} rows in expected.json")


if __name__ == "__main__":
    main()
