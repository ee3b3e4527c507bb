"""ONNX models: data outside their folder, graphs without end, functions that call themselves, sizes of no sense."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from attack import WEIGHT, Attack, Build
from onnx import AttributeProto, TensorProto, helper, numpy_helper

FLOAT = TensorProto.FLOAT


def graph(nodes: Sequence[Any], tensors: Sequence[Any] = (), outputs: str = "y", **more: Any) -> Any:
    """A graph of one input ``x`` with four numbers."""
    inputs = [helper.make_tensor_value_info("x", FLOAT, (1, 4))]
    results = [helper.make_tensor_value_info(name, FLOAT, None) for name in outputs.split()]
    weight = numpy_helper.from_array(WEIGHT, "w")
    return helper.make_graph(list(nodes), "net", inputs, results, [weight, *tensors], **more)


def product(source: str = "x", target: str = "y") -> Any:
    return helper.make_node("MatMul", [source, "w"], [target])


def model(body: Any, **more: Any) -> Any:
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("net", 1)]
    return helper.make_model(body, opset_imports=imports, ir_version=8, **more)


def linear() -> Any:
    """An honest model."""
    return model(graph([product()]))


def saved(make: Callable[[], Any], change: Callable[[bytes], bytes] = bytes) -> Build:
    def build(folder: Path) -> Path:
        (folder / "net.onnx").write_bytes(change(make().SerializeToString()))
        return folder / "net.onnx"

    return build


def chain(op: str, count: int) -> Callable[[], Any]:
    """x → op → op → … → MatMul."""

    def make() -> Any:
        nodes = [helper.make_node(op, [f"v{n}" if n else "x"], [f"v{n + 1}"]) for n in range(count)]
        return model(graph([*nodes, product(f"v{count}")]))

    return make


def empty_nodes(count: int) -> Callable[[bytes], bytes]:
    """Nodes of two bytes each in the graph: a parser makes a hundred of them."""

    def change(data: bytes) -> bytes:
        proto = onnx.ModelProto.FromString(data)
        body = proto.graph.SerializeToString() + b"\x0a\x00" * count
        proto.ClearField("graph")
        return proto.SerializeToString() + b"\x3a" + varint(len(body)) + body

    return change


def varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def nested_if(levels: int) -> Callable[[bytes], bytes]:
    """A branch in a branch in a branch…, made of bytes: the library itself would not go so deep."""

    def change(data: bytes) -> bytes:
        proto = onnx.ModelProto.FromString(data)
        body = onnx.GraphProto(
            name="deep", node=[helper.make_node("Identity", ["x"], ["z"])]
        ).SerializeToString()
        for _ in range(levels):
            attribute = b"\x0a\x0bthen_branch" + b"\x32" + varint(len(body)) + body + b"\xa0\x01\x05"
            node = b"\x22\x02If" + b"\x2a" + varint(len(attribute)) + attribute
            body = b"\x12\x04deep" + b"\x0a" + varint(len(node)) + node
        whole = proto.graph.SerializeToString() + body[6:]
        proto.ClearField("graph")
        return proto.SerializeToString() + b"\x3a" + varint(len(whole)) + whole

    return change


def branches(levels: int) -> Any:
    """If in If, as deep as the library goes; each with both branches."""
    flag = numpy_helper.from_array(np.array(True), "flag")
    body: Any = helper.make_graph(
        [product("x", "b")], "b", [], [helper.make_tensor_value_info("b", FLOAT, None)]
    )
    for level in range(levels):
        node = helper.make_node("If", ["c"], [f"b{level}"], then_branch=body, else_branch=body)
        body = helper.make_graph([node], "b", [], [helper.make_tensor_value_info(f"b{level}", FLOAT, None)])
    cast = helper.make_node("ReduceMax", ["x"], ["m"], keepdims=0)
    cond = helper.make_node("Cast", ["m"], ["c"], to=TensorProto.BOOL)
    top = helper.make_node("If", ["c"], ["z"], then_branch=body, else_branch=body)
    return model(graph([cast, cond, top, product()], [flag], "y z"))


def functions(calls: dict[str, list[str]], first: str) -> Callable[[], Any]:
    """Local functions that call each other: name → what it calls, one after the other."""

    def make() -> Any:
        bodies = []
        for name, called in calls.items():
            nodes = [
                helper.make_node(
                    inner, [f"v{n}" if n else "a"], [f"v{n + 1}"], domain="" if inner == "Relu" else "net"
                )
                for n, inner in enumerate(called)
            ]
            nodes.append(helper.make_node("Identity", [f"v{len(called)}"], ["b"]))
            bodies.append(
                helper.make_function("net", name, ["a"], ["b"], nodes, [helper.make_opsetid("", 17)])
            )
        node = helper.make_node(first, ["x"], ["h"], domain="net")
        return model(graph([node, product("h")]), functions=bodies)

    return make


def laughing(levels: int) -> dict[str, list[str]]:
    return {f"f{n}": [f"f{n + 1}"] * 10 for n in range(levels)} | {f"f{levels}": ["Relu"]}


def sized(dims: Sequence[int], data: bytes = b"") -> Callable[[], Any]:
    """A second tensor of any dimensions, used by a product."""

    def make() -> Any:
        tensor = TensorProto(name="v", data_type=FLOAT, dims=dims, raw_data=data)
        return model(graph([product(), helper.make_node("MatMul", ["x", "v"], ["z"])], [tensor], "y z"))

    return make


def filled(dims: Sequence[int]) -> Callable[[], Any]:
    """A constant that the model computes: dimensions cost nothing to write down."""

    def make() -> Any:
        shape = numpy_helper.from_array(np.array(dims, np.int64), "dims")
        fill = helper.make_node("ConstantOfShape", ["dims"], ["v"])
        return model(graph([fill, product(), helper.make_node("MatMul", ["x", "v"], ["z"])], [shape], "y z"))

    return make


def grown(op: str, *numbers: Any, **attributes: Any) -> Callable[[], Any]:
    """A constant that an operation blows up."""

    def make() -> Any:
        extra = [numpy_helper.from_array(np.array(value), f"n{place}") for place, value in enumerate(numbers)]
        node = helper.make_node(op, [tensor.name for tensor in extra], ["v"], **attributes)
        return model(graph([node, product(), helper.make_node("Add", ["x", "v"], ["z"])], extra, "y z"))

    return make


def open_input(dims: Sequence[int]) -> Callable[[], Any]:
    def make() -> Any:
        proto = linear()
        proto.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", FLOAT, dims))
        return proto

    return make


def labelled(length: int, bodies: int) -> Any:
    """A long label around many bodies: every key in them would repeat it."""
    inner = [
        helper.make_node(
            "If", ["c"], [f"i{n}"], name="n", then_branch=one_constant(), else_branch=one_constant()
        )
        for n in range(bodies)
    ]
    body = helper.make_graph(inner, "b", [], [helper.make_tensor_value_info("i0", FLOAT, None)])
    cast = helper.make_node("Cast", ["x"], ["c"], to=TensorProto.BOOL)
    outer = helper.make_node("If", ["c"], ["z"], name="l" * length, then_branch=body, else_branch=body)
    return model(graph([cast, outer, product()], [], "y z"))


def one_constant() -> Any:
    value = numpy_helper.from_array(np.ones((2, 2), np.float32), "k")
    return helper.make_graph([helper.make_node("Identity", ["k"], ["o"])], "b", [], [
        helper.make_tensor_value_info("o", FLOAT, None)], [value])  # fmt: skip


def conv(**attributes: Any) -> Callable[[], Any]:
    def make() -> Any:
        kernel = numpy_helper.from_array(np.ones((1, 1, 2, 2), np.float32), "k")
        image = helper.make_node("Reshape", ["x", "s"], ["i"])
        shape = numpy_helper.from_array(np.array([1, 1, 2, 2]), "s")
        node = helper.make_node("Conv", ["i", "k"], ["z"], **attributes)
        return model(graph([image, node, product()], [kernel, shape], "y z"))

    return make


def with_second_graph(data: bytes) -> bytes:
    """A message whose graph comes in two parts, which a parser merges."""
    more = onnx.GraphProto(node=[helper.make_node("Relu", ["y"], ["q"])])
    return data + onnx.ModelProto(graph=more).SerializeToString()


def renamed(make: Callable[[], Any], names: dict[str, str]) -> Callable[[], Any]:
    def change() -> Any:
        proto = make()
        for node in proto.graph.node:
            node.input[:] = [names.get(name, name) for name in node.input]
            node.output[:] = [names.get(name, name) for name in node.output]
        return proto

    return change


def bombed(count: int) -> Callable[[bytes], bytes]:
    """Numbers of one byte each that a parser keeps as eight."""

    def change(data: bytes) -> bytes:
        packed = b"\x08\x7a\x10\x07" + b"\x3a" + varint(count) + bytes(count)
        proto = onnx.ModelProto.FromString(data)
        body = proto.graph.SerializeToString() + b"\x2a" + varint(len(packed)) + packed
        proto.ClearField("graph")
        return proto.SerializeToString() + b"\x3a" + varint(len(body)) + body

    return change


CYCLE = [helper.make_node("Add", ["x", "q"], ["p"]), helper.make_node("Relu", ["p"], ["q"]), product("q")]
UNWRITTEN = "which nothing before it writes"

ATTACKS = [
    # --- graphs
    Attack("onnx graph with a cycle", saved(lambda: model(graph(CYCLE))), lost=UNWRITTEN),
    Attack("onnx node that reads itself", saved(renamed(linear, {"x": "y"})), lost=UNWRITTEN),
    Attack("onnx weight that is missing", saved(renamed(linear, {"w": "gone"})), lost=UNWRITTEN),
    Attack(
        "onnx output that is missing", saved(lambda: model(graph([product()], [], "y gone"))), lost=UNWRITTEN
    ),
    Attack("onnx chain of 2000 nodes", saved(chain("Identity", 2_000))),
    Attack(
        "onnx graph of many nodes",
        saved(linear, empty_nodes(2000)),
        refused="limit nodes = 1,000",
        options=("--limit", "nodes=1000"),
    ),
    Attack(
        "onnx constant of one-byte numbers",
        saved(linear, bombed(9_000_000)),
        refused="limit model_fields = 900,000",
        options=("--limit", "model_fields=900_000"),
    ),
    Attack(
        "onnx graph of a million nodes",
        saved(linear, empty_nodes(1_000_000)),
        refused="limit nodes = 250,000",
        seconds=60,
        slow=True,
    ),
    Attack(
        "onnx file of many fields",
        saved(linear, empty_nodes(4_300_000)),
        refused="limit model_fields = 9,000",
        options=("--limit", "model_fields=9000"),
    ),
    Attack(
        "onnx file of 6 million fields",
        saved(linear, empty_nodes(6_000_000)),
        refused="limit model_fields = 5,000",
        seconds=60,
        slow=True,
    ),
    Attack("onnx chain of 50 000 nodes", saved(chain("Identity", 50_000)), seconds=100, slow=True),
    Attack(
        "onnx numbers of one byte",
        saved(linear, bombed(150_000_000)),
        refused="limit model_fields",
        seconds=60,
        slow=True,
    ),
    Attack(
        "onnx function that calls itself",
        saved(functions({"f": ["f"]}, "f")),
        refused="function 'f' of the model calls itself",
    ),
    Attack(
        "onnx functions that call each other",
        saved(functions({"f": ["g"], "g": ["f"]}, "f")),
        refused="calls itself",
    ),
    Attack("onnx functions of a billion laughs", saved(functions(laughing(9), "f0")), refused="limit nodes"),
    Attack("onnx functions in functions", saved(functions(laughing(2), "f0")), seconds=60),
    Attack("onnx branches 20 deep", saved(lambda: branches(5)), seconds=60),
    Attack("onnx branches 10 000 deep", saved(linear, nested_if(10_000)), refused="does not parse"),
    Attack("onnx branches 30 deep", saved(linear, nested_if(30)), lost="has no two branches"),
    Attack(
        "onnx label of 100 kB around many bodies",
        saved(lambda: labelled(100_000, 500)),
        refused="limit name_bytes",
    ),
    Attack(
        "onnx names of nodes that are one",
        saved(
            lambda: model(
                graph([*[helper.make_node("Relu", ["x"], ["r"]) for _ in range(2000)], product("r")])
            )
        ),
        seconds=60,
    ),
    # --- sizes
    Attack("onnx tensor of 2^62 numbers", saved(sized([2**31, 2**31])), refused="limit model_bytes"),
    Attack("onnx tensor whose size overflows", saved(sized([2**62, 2**62])), refused="limit model_bytes"),
    Attack("onnx tensor of a negative size", saved(sized([-4, 4], bytes(64))), lost="negative size"),
    Attack(
        "onnx tensor with too few bytes",
        saved(sized([4, 4], bytes(60))),
        lost="other bytes than its shape says",
    ),
    Attack(
        "onnx tensor of a million axes",
        saved(sized([1] * 10**6, bytes(4))),
        refused="impossible number of 1000000 axes",
    ),
    Attack("onnx input of 2^62", saved(open_input([1, 2**62, 4]))),
    Attack("onnx input of a negative size", saved(open_input([-1, 4]))),
    Attack(
        "onnx constant of a terabyte",
        saved(filled([2**19, 2**19])),
        failed="would have 274877906944 entries",
        clip=4,
    ),
    Attack("onnx constant of negative size", saved(filled([-4, 4]))),
    Attack("onnx constant blown up by Expand", saved(grown("Expand", 1.0, [2**20, 2**20]))),
    Attack("onnx constant blown up by Tile", saved(grown("Tile", [1.0], [2**40]))),
    Attack("onnx constant blown up by Range", saved(grown("Range", 0, 2**40, 1))),
    Attack("onnx constant blown up by Pad", saved(grown("Pad", [1.0], [0, 2**40]))),
    Attack("onnx constant blown up by OneHot", saved(grown("OneHot", [1], 2**40, [0.0, 1.0]))),
    Attack("onnx constant blown up by EyeLike", saved(grown("ConstantOfShape", [2**34]))),
    Attack(
        "onnx constant blown up by Resize",
        saved(grown("Resize", [[[[1.0]]]], [], [1.0, 1.0, 2.0**15, 2.0**15])),
    ),
    Attack("onnx window with a stride of 0", saved(conv(strides=[0, 0])), clip=4),
    Attack("onnx window with a dilation of 2^62", saved(conv(dilations=[2**62, 2**62]))),
    Attack("onnx window with a padding of 2^40", saved(conv(pads=[2**40] * 4)), clip=4),
    Attack("onnx window with a million groups", saved(conv(group=10**6)), clip=4),
    Attack("onnx window with negative groups", saved(conv(group=-1)), clip=4),
    Attack(
        "onnx operation that nobody knows",
        saved(
            lambda: model(
                graph(
                    [
                        product(),
                        helper.make_node(
                            "Execute", ["y"], ["z"], domain="com.evil", command="payload-of-an-attack"
                        ),
                    ],
                    [],
                    "y z",
                )
            )
        ),
    ),
    Attack("onnx model with two graphs", saved(linear, with_second_graph), clip=2),
    Attack("onnx attribute of two kinds", saved(lambda: two_kinds())),
]


def two_kinds() -> Any:
    """An attribute that says it is a graph and holds a number, beside one that holds both."""
    proto = linear()
    node = proto.graph.node.add(op_type="Relu", input=["y"], output=["q"])
    node.attribute.add(name="a", type=AttributeProto.GRAPH, i=3)
    node.attribute.add(name="b", type=AttributeProto.INT, f=1.0)
    return proto
