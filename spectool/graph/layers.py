"""What each class of ``torch.nn`` does, from attributes that a pickle keeps: geometry, sizes, affine or not.

Nothing is imported or run. Attributes that old pickles lack have the value that the class had then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from spectool.graph.classify import nonlinear
from spectool.graph.module import Layer, Module, claim, expect, per_axis
from spectool.graph.pools import POOLS
from spectool.graph.rows import batchnorm_step, conv_step, embedding_step, linear_step, region
from spectool.graph.types import Shape
from spectool.linear.geometry import ConvGeometry, PaddingMode


def layer(module: Module) -> Layer:
    """Return what a module does.

    Raises:
        UsageError: If its input does not have the size that it takes.
    """
    if module.cls in _NAMED:
        return Layer(known=False)
    if module.cls in _NEUTRAL:
        return Layer(neutral=True, out_shape=module.shape)
    rule = _RULES.get(module.cls)
    if rule is None and (module.cls in _SAME or module.tree.cls.startswith(_ACTIVATIONS)):
        return Layer(out_shape=module.shape)
    try:
        return (rule or _by_attributes)(module)
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError):
        # Attributes come from the file and may be anything; names and shapes of the tensors still speak.
        return Layer(known=False)


def convolution_geometry(module: Module, kernel: tuple[int, ...], *, transposed: bool) -> ConvGeometry:
    """Return the geometry that a convolution's attributes describe.

    Args:
        module: The module.
        kernel: Spatial shape of its kernel.
        transposed: Whether it is a transposed convolution.
    """
    dims = len(kernel)
    stride = module.sizes("stride", dims, 1)
    dilation = module.sizes("dilation", dims, 1)
    padding = module.get("padding", 0)
    if padding == "valid":
        pads = ((0, 0),) * dims
    elif padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        pads = tuple((total // 2, total - total // 2) for total in totals)
    else:
        pads = tuple((p, p) for p in per_axis(padding, dims))
    mode: PaddingMode = "zeros"
    if not transposed and any(sum(pair) for pair in pads):
        named = module.get("padding_mode", "zeros")
        if named in ("circular", "reflect", "replicate"):
            mode = named
    extra = module.sizes("output_padding", dims, 0) if transposed else (0,) * dims
    groups = int(module.get("groups", 1))
    if min(*stride, *dilation, groups) < 1:
        raise ValueError("a convolution has positive strides, dilations and groups")
    return ConvGeometry(stride, pads, dilation, groups, mode, transposed, extra)


def _convolution(module: Module) -> Layer:
    name = module.name("weight")
    if not name or len(module.weights.shape(name)) < 3:
        return Layer()
    shape = module.weights.shape(name)
    transposed = bool(module.get("transposed", "Transpose" in module.cls))
    geometry = convolution_geometry(module, shape[2:], transposed=transposed)
    if shape[0] % geometry.groups:
        raise ValueError("groups divide channels")
    channels = shape[0] if transposed else shape[1] * geometry.groups
    outputs = shape[1] * geometry.groups if transposed else shape[0]
    out: Shape | None = None
    if module.shape is not None:
        expect(
            module,
            len(module.shape) == geometry.dims + 1 and module.shape[0] == channels,
            f"{channels} channels",
        )
        out = (outputs, *geometry.output_size(module.shape[1:], shape[2:]))
        expect(module, min(out) > 0, f"room for a kernel of {shape[2:]}")
    step = conv_step(module.weights, name, geometry, in_shape=module.shape, out_shape=out)
    return Layer(step=step, out_shape=out, claimed=claim(module))


def _linear(module: Module) -> Layer:
    name = module.name("weight")
    if not name or len(module.weights.shape(name)) != 2:
        return Layer()
    step = linear_step(module.weights, name)
    out: Shape | None = None
    if module.shape is not None and step.in_shape is not None and step.out_shape is not None:
        expect(module, module.shape[-1:] == step.in_shape, f"{step.in_shape[0]} features")
        out = (*module.shape[:-1], *step.out_shape)
    return Layer(step=step, out_shape=out, claimed=claim(module))


def _batch_norm(module: Module) -> Layer:
    mean, var = module.name("running_mean"), module.name("running_var")
    gamma = module.name("weight")
    if not mean or not var:
        return _norm(module)
    if module.shape is not None:
        channels = module.weights.shape(var)[0]
        expect(module, module.shape[0] == channels, f"{channels} channels")
    step = batchnorm_step(
        module.weights,
        gamma=gamma,
        beta=module.name("bias"),
        mean=mean,
        var=var,
        eps=float(module.get("eps", 1e-5)),
        shape=module.shape,
    )
    return Layer(step=step, out_shape=module.shape, claimed=claim(module))


def _norm(module: Module) -> Layer:
    gain = module.name("weight")
    kinds = {"LayerNorm": "layernorm", "GroupNorm": "groupnorm", "RMSNorm": "rmsnorm"}
    kind = kinds.get(module.cls, "instancenorm" if "Instance" in module.cls else "batchnorm")
    if not gain:
        return Layer(out_shape=module.shape)
    row = nonlinear(module.weights, gain, kind, "divides by statistics of its input")
    return Layer(out_shape=module.shape, rows=(row,), claimed=claim(module))


def _prelu(module: Module) -> Layer:
    slopes = module.name("weight")
    rows = (nonlinear(module.weights, slopes, "prelu", "slopes of a PReLU"),) if slopes else ()
    return Layer(out_shape=module.shape, rows=rows, claimed=claim(module))


def _embedding(module: Module) -> Layer:
    name = module.name("weight")
    if not name or len(module.weights.shape(name)) != 2:
        return Layer()
    bag = "one index of the bag" if module.cls == "EmbeddingBag" else ""
    row = region([embedding_step(module.weights, name, note=bag)])
    width = module.weights.shape(name)[1]
    out = (*module.shape, width) if module.shape is not None and not bag else None
    return Layer(out_shape=out, rows=(row,), claimed=claim(module))


def _bilinear(module: Module) -> Layer:
    name = module.name("weight")
    rows = (
        (nonlinear(module.weights, name, "linear", "linear in each of two inputs, not in both"),)
        if name
        else ()
    )
    return Layer(rows=rows, claimed=claim(module))


def _by_attributes(module: Module) -> Layer:
    """Return what a class that torch does not have seems to be by what its pickle holds, never part of a chain."""
    name = module.name("weight")
    rank = len(module.weights.shape(name)) if name else 0
    wanted = {"stride", "padding", "dilation", "groups", "kernel_size", "transposed"}
    if 3 <= rank <= 5 and wanted <= set(module.tree.attributes):
        shape = module.weights.shape(name)
        geometry = convolution_geometry(module, shape[2:], transposed=bool(module.get("transposed")))
        said = (f"a convolution by the attributes of {module.tree.cls}",)
        row = region([conv_step(module.weights, name, geometry, assumed=said)])
        return Layer(known=False, rows=(row,), claimed=claim(module))
    return Layer(known=False)


_NEUTRAL = frozenset(
    {"Identity", "Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout"}
)
# Their parameters' own names say everything, or they change the size: left to the rules on names.
_NAMED = frozenset(
    {"RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell", "MultiheadAttention", "GLU", "ParameterList"}
)
_ACTIVATIONS = "torch.nn.modules.activation."
_SAME = frozenset({"LocalResponseNorm", "CrossMapLRN2d", "Softmax2d"})
Rule = Callable[[Module], Layer]
_RULES: Mapping[str, Rule] = {
    **POOLS,
    **{f"Conv{d}d": _convolution for d in (1, 2, 3)},
    **{f"ConvTranspose{d}d": _convolution for d in (1, 2, 3)},
    **{f"BatchNorm{d}d": _batch_norm for d in (1, 2, 3)},
    **{f"InstanceNorm{d}d": _batch_norm for d in (1, 2, 3)},
    **dict.fromkeys(("Linear", "NonDynamicallyQuantizableLinear"), _linear),
    **dict.fromkeys(("LayerNorm", "GroupNorm", "RMSNorm"), _norm),
    **dict.fromkeys(("Embedding", "EmbeddingBag"), _embedding),
    "SyncBatchNorm": _batch_norm,
    "PReLU": _prelu,
    "Bilinear": _bilinear,
}
