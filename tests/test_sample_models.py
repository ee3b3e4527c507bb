"""The sample files and their answers, by the formats' ordinary loaders, NumPy and onnxruntime; no spectool here."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from safetensors import safe_open
from safetensors.torch import load_file
from scipy.linalg import svdvals
from torch import nn

SAMPLES = Path(__file__).parents[1] / "sample_models"
EXPECTED = json.loads((SAMPLES / "expected.json").read_text())
CNN_CONTAINERS = (
    "digits_cnn_training.pt",
    "digits_cnn_legacy.pt",
    "digits_cnn.safetensors",
    "digits_cnn_module.pt",
    "digits_cnn.onnx",
    "digits_cnn_external.onnx",
    "digits_cnn.pt2",
    "digits_cnn_torchscript.pt",
)
CNN_PROGRAMS = (
    "digits_cnn_module.pt",
    "digits_cnn.onnx",
    "digits_cnn_external.onnx",
    "digits_cnn.pt2",
    "digits_cnn_torchscript.pt",
)
CNN_ONNX_OUTPUTS = {"digits_cnn.onnx", "digits_cnn_external.onnx"}
Arrays = dict[str, np.ndarray]


@pytest.fixture
def classes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make the classes of the pickled modules importable, for this test only."""
    monkeypatch.syspath_prepend(str(SAMPLES))
    yield
    sys.modules.pop("nets", None)


def whole_module(name: str) -> nn.Module:
    return torch.load(SAMPLES / name, weights_only=False)


def torchscript(name: str) -> torch.jit.ScriptModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit is deprecated, its files are not
        return torch.jit.load(SAMPLES / name)


def exported(name: str) -> torch.export.ExportedProgram:
    return torch.export.load(SAMPLES / name)


def read(name: str) -> Arrays:
    """Read the named tensors of a file with its format's ordinary loader."""
    path = SAMPLES / name
    if path.suffix == ".onnx":
        graph = onnx.load(path).graph
        arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        # The exporter stores equal tensors once: two biases added to one sum have had the same gradients.
        copies = [node for node in graph.node if node.op_type == "Identity" and node.input[0] in arrays]
        return {**arrays, **{node.output[0]: arrays[node.input[0]] for node in copies}}
    if path.suffix == ".safetensors":
        tensors = load_file(path)
    elif path.is_dir():
        index = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
        tensors = {key: load_file(path / file)[key] for key, file in index.items()}
    elif path.suffix == ".pt2":
        tensors = exported(name).state_dict
    elif name.endswith("_torchscript.pt"):
        tensors = torchscript(name).state_dict()
    elif name.endswith("_module.pt"):
        tensors = whole_module(name).state_dict()
    else:
        tensors = torch.load(path, weights_only=True)
    if "state_dict" in tensors:
        tensors = {key.removeprefix("module."): tensor for key, tensor in tensors["state_dict"].items()}
    return {key: tensor.detach().float().numpy() for key, tensor in tensors.items()}


def run_onnx(name: str, **feeds: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(SAMPLES / name, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


# --- the files --------------------------------------------------------------------------------------------


def test_every_file_has_an_answer_and_every_answer_a_file() -> None:
    beside = {".py", ".md", ".json", ".data"}
    present = {path.name for path in SAMPLES.glob("[!._]*") if path.suffix not in beside}
    assert present == set(EXPECTED["files"])
    assert {entry["answers"] for entry in EXPECTED["files"].values()} == set(EXPECTED["answers"])


def test_the_readme_describes_every_file() -> None:
    text = (SAMPLES / "README.md").read_text()
    assert [name for name in EXPECTED["files"] if f"`{name}" not in text] == []


def test_the_files_are_small_and_name_no_folder_of_the_machine_that_built_them() -> None:
    files = [path for pattern in ("[!._]*", "[!._]*/*") for path in SAMPLES.glob(pattern) if path.is_file()]
    sizes = {path.name: path.stat().st_size for path in files}
    assert max(sizes.values()) < 300_000, max(sizes, key=lambda name: sizes[name])
    assert sum(sizes.values()) < 3_000_000
    for path in files:
        data = path.read_bytes()
        assert not [mark for mark in (b"/site-packages/", b"/home/", b"/work/", b"/root/") if mark in data], (
            path
        )


@pytest.mark.usefixtures("classes")
@pytest.mark.parametrize("name", CNN_CONTAINERS)
def test_every_container_of_the_cnn_holds_the_same_tensors(name: str) -> None:
    reference = read("digits_cnn_state.pt")
    found = read(name)
    counters = {key for key in reference if key.endswith("num_batches_tracked")}
    if name in CNN_ONNX_OUTPUTS:  # an exporter leaves out what evaluation does not read
        assert set(reference) - counters <= set(found)
    else:
        assert set(found) == set(reference)
    for key in set(reference) - counters:
        assert np.array_equal(found[key], reference[key]), key


@pytest.mark.usefixtures("classes")
@pytest.mark.parametrize("name", CNN_PROGRAMS)
def test_every_program_of_the_cnn_computes_the_same_logits(name: str) -> None:
    image = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    wanted = whole_module("digits_cnn_module.pt")(image).detach().numpy()
    if name.endswith(".onnx"):
        found = run_onnx(name, image=image.numpy())[0]
    else:
        program: Callable[..., torch.Tensor]
        if name.endswith(".pt2"):
            program = exported(name).module()
        else:
            program = torchscript(name) if "torchscript" in name else whole_module(name)
        found = program(image).detach().numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    assert np.abs(wanted).max() > 0.1


@pytest.mark.parametrize("name", [name for name in EXPECTED["files"] if name.endswith(".onnx")])
def test_onnx_files_are_valid(name: str) -> None:
    onnx.checker.check_model(SAMPLES / name, full_check=True)


@pytest.mark.parametrize("name", sorted(CNN_ONNX_OUTPUTS))
def test_batch_norms_are_kept_as_nodes(name: str) -> None:
    operators = [node.op_type for node in onnx.load(SAMPLES / name).graph.node]
    assert operators.count("BatchNormalization") == 9
    assert operators.count("Conv") == 8
    assert operators.count("ConvTranspose") == 1


def test_the_external_file_holds_the_weights() -> None:
    bare = onnx.load(SAMPLES / "digits_cnn_external.onnx", load_external_data=False)
    outside = {
        tensor.name for tensor in bare.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL
    }
    assert {"stem.conv.weight", "up.conv.weight", "head.weight"} <= outside


def test_the_training_checkpoint_carries_an_optimizer() -> None:
    nest = torch.load(SAMPLES / "digits_cnn_training.pt", weights_only=True)
    assert {"epoch", "state_dict", "optimizer"} <= set(nest)
    assert all(key.startswith("module.") for key in nest["state_dict"])
    assert any("momentum_buffer" in slot for slot in nest["optimizer"]["state"].values())


def test_the_legacy_file_is_no_zip() -> None:
    head = (SAMPLES / "digits_cnn_legacy.pt").read_bytes()[:64]
    assert bytes.fromhex("1950a86a20f9469cfc6c")[::-1] in head
    assert not head.startswith(b"PK")


@pytest.mark.parametrize("name", ["digits_mlp_sharded", "digits_mlp.onnx"])
def test_every_container_of_the_mlp_holds_the_same_tensors(name: str) -> None:
    reference, found = read("digits_mlp_state.pt"), read(name)
    assert set(found) == set(reference)
    assert all(np.array_equal(found[key], reference[key]) for key in reference)


def test_the_mlp_is_sharded() -> None:
    folder = SAMPLES / "digits_mlp_sharded"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) >= 2
    assert index["metadata"]["total_size"] == sum(
        array.nbytes for array in read("digits_mlp_state.pt").values()
    )


def test_the_half_file_is_the_rounded_mlp() -> None:
    half = load_file(SAMPLES / "digits_mlp_bf16.safetensors")
    reference = torch.load(SAMPLES / "digits_mlp_state.pt", weights_only=True)
    assert {tensor.dtype for tensor in half.values()} == {torch.bfloat16}
    assert all(torch.equal(half[key], reference[key].bfloat16()) for key in reference)


# --- the answers ------------------------------------------------------------------------------------------


def answers(name: str) -> dict[tuple[str, str], dict[str, Any]]:
    rows = EXPECTED["answers"][EXPECTED["files"][name]["answers"]]
    keyed = {(row["layer"], row["level"]): row for row in rows}
    assert len(keyed) == len(rows)
    return keyed


def sigma(name: str, layer: str, level: str = "layer") -> list[float]:
    return answers(name)[layer, level]["sigma"]


@pytest.mark.parametrize("name", list(EXPECTED["files"]))
def test_answers_contradict_neither_themselves_nor_their_shapes(name: str) -> None:
    for row in answers(name).values():
        values = row["sigma"]
        assert values == sorted(values, reverse=True)
        assert values[0] > 0
        if row["input_shape"] is None:
            assert len(values) == 1
        else:
            smaller = min(int(np.prod(row["input_shape"])), int(np.prod(row["output_shape"])))
            assert len(values) == min(8, smaller)
            assert np.linalg.norm(values) <= row["fro"] * (1 + 1e-12)


@pytest.mark.parametrize(
    "name",
    [
        "digits_mlp_state.pt",
        "digits_mlp_sharded",
        "digits_mlp.onnx",
        "digits_mlp_bf16.safetensors",
        "digits_cnn.onnx",
    ],
)
def test_answers_of_linear_layers_are_those_of_the_stored_matrix(name: str) -> None:
    arrays = read(name)
    linear = [row for row in answers(name).values() if row["kind"] == "linear"]
    assert linear
    for row in linear:
        wanted = np.linalg.svd(arrays[row["layer"]].astype(np.float64), compute_uv=False)[:8]
        np.testing.assert_allclose(row["sigma"], wanted, rtol=1e-12)


def test_the_linear_chain_is_the_product() -> None:
    arrays = read("digits_mlp_state.pt")
    product = arrays["fc3.weight"].astype(np.float64) @ arrays["fc2.weight"].astype(np.float64)
    found = sigma("digits_mlp.onnx", "fc2.weight + fc3.weight", "composed")
    np.testing.assert_allclose(found, svdvals(product)[:8], rtol=1e-12)


def test_an_average_pool_of_disjoint_2x2_windows_halves_the_head() -> None:
    """Its rows are orthogonal with norm 1/2, so it halves every singular value of the Linear behind it."""
    alone = np.array(sigma("digits_cnn.onnx", "head.weight"))
    np.testing.assert_allclose(sigma("digits_cnn.onnx", "head.weight", "composed"), alone / 2, rtol=1e-12)


def test_the_size_free_answer_bounds_every_size() -> None:
    """Where padding is with zeros, the real layer is a compression of the one on the infinite grid."""
    zero_padded = ["down", "depthwise", "pointwise", "dilated", "project", "shortcut", "up"]
    for name in zero_padded:
        real = sigma("digits_cnn.onnx", f"{name}.conv.weight")[0]
        geometry = sigma("digits_cnn_module.pt", f"{name}.conv.weight")[0]
        plain = sigma("digits_cnn_state.pt", f"{name}.conv.weight")[0]
        assert real <= geometry * (1 + 1e-12) <= plain * (1 + 2e-12), name
    assert sigma("digits_cnn_module.pt", "dilated.conv.weight") == pytest.approx(
        sigma("digits_cnn_state.pt", "dilated.conv.weight"), rel=1e-9
    )


@pytest.mark.parametrize(
    "name, eps",
    [("digits_cnn.onnx", float(np.float32(1e-5))), ("digits_cnn.pt2", 1e-5)],
    ids=["float32", "float64"],
)
def test_batch_norm_answers_are_the_closed_form(name: str, eps: float) -> None:
    arrays = {key: array.astype(np.float64) for key, array in read("digits_cnn_state.pt").items()}
    norms = [row for row in answers(name).values() if row["kind"] == "batchnorm"]
    assert len(norms) == 9
    for row in norms:
        variance = arrays[row["layer"].replace("weight", "running_var")]
        scale = np.abs(arrays[row["layer"]]) / np.sqrt(variance + eps)
        copies = int(np.prod(row["input_shape"][1:]))
        wanted = np.repeat(np.sort(scale)[::-1], copies)
        np.testing.assert_allclose(row["sigma"], wanted[:8], rtol=1e-14)
        assert row["fro"] == pytest.approx(np.linalg.norm(wanted), rel=1e-12)


def test_reparametrised_answers_are_what_torch_computes() -> None:
    """Loaded into torch's own reparametrised layers, the file gives these matrices."""
    layers = {
        "fc1": nn.Linear(64, 48),
        "fc2": nn.Linear(48, 32),
        "fc3": nn.Linear(32, 24),
        "fc4": nn.Linear(24, 10),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(layers["fc1"])
    nn.utils.parametrizations.weight_norm(layers["fc2"])
    nn.utils.spectral_norm(layers["fc3"])
    nn.utils.parametrizations.spectral_norm(layers["fc4"])
    model = nn.ModuleDict(layers).eval()
    model.load_state_dict(torch.load(SAMPLES / "digits_mlp_weightnorm.pt", weights_only=True))
    for name, layer in model.items():
        count = layer.in_features
        with torch.no_grad():
            matrix = (layer(torch.eye(count)) - layer(torch.zeros(1, count))).T.double().numpy()
        found = sigma("digits_mlp_weightnorm.pt", f"{name}.weight")
        np.testing.assert_allclose(found, svdvals(matrix)[:8], rtol=1e-5, err_msg=name)


def test_quantised_answers_are_what_onnxruntime_computes() -> None:
    """The first convolution by cutting the model behind it, the second by cutting it before."""
    path = SAMPLES / "quantised_conv.onnx"
    cuts = {
        "conv1": ("image", (3, 8, 8), "conv1_output"),
        "conv2": ("relu1_output", (6, 8, 8), "conv2_output"),
    }
    for name, (start, shape, stop) in cuts.items():
        model = onnx.utils.Extractor(onnx.shape_inference.infer_shapes(onnx.load(path)))
        part = model.extract_model([start], [stop]).SerializeToString()
        session = onnxruntime.InferenceSession(part, providers=["CPUExecutionProvider"])
        basis = np.eye(int(np.prod(shape)), dtype=np.float32).reshape(-1, 1, *shape)
        matrix = np.stack([session.run(None, {start: vector})[0].ravel() for vector in basis], axis=1)
        found = sigma("quantised_conv.onnx", f"{name}.weight_quantized")
        np.testing.assert_allclose(found, svdvals(matrix.astype(np.float64))[:8], rtol=1e-5)


def test_lora_answers_are_the_scaled_products() -> None:
    path = SAMPLES / "lora_pair.safetensors"
    tensors = {key: tensor.double().numpy() for key, tensor in load_file(path).items()}
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["lora_adapter_metadata"])
    scale = config["lora_alpha"] / config["r"]
    rows = answers("lora_pair.safetensors").values()
    assert len(rows) == 2
    for row in rows:
        down, up = row["matrices"]
        np.testing.assert_allclose(row["sigma"], svdvals(scale * tensors[up] @ tensors[down])[:8], atol=1e-12)
