"""Programs as data: TorchScript code that is interpreted, never compiled, and the JSON graphs of .pt2 archives."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from attack import FOREIGN, TOKEN, WEIGHT, Attack, Build, tensor, text, zip_bytes

HEAD = """class Net(Module):
  __parameters__ = ["w", ]
  __buffers__ = []
  w : Tensor
  training : bool
  def forward(self: __torch__.nets.Net, x: Tensor) -> Tensor:
"""
RESULT = "    return torch.matmul(x, self.w)\n"
LINE = "    y = 1\n"
ROOT = b"\x80\x02c__torch__.nets\nNet\n)\x81}(" + text("training") + b"\x89" + text("w") + tensor() + b"ub."


def script(*lines: str, code: Callable[[], str] | None = None, root: bytes = ROOT, **files: bytes) -> Build:
    """A TorchScript archive whose forward consists of these lines; the last should return the honest product."""

    def build(folder: Path) -> Path:
        body = "".join(f"    {line}\n" for line in lines)
        written = code() if code else f"{HEAD}{body}{RESULT}"
        records = {
            "net/data.pkl": root,
            "net/data/0": WEIGHT.tobytes(),
            "net/code/__torch__/nets.py": written.encode(),
            "net/constants.pkl": b"\x80\x02).",
            **{f"net/{name}": content for name, content in files.items()},
        }
        path = folder / "net.pt"
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in records.items():
                method = zipfile.ZIP_DEFLATED if name.endswith(".py") else zipfile.ZIP_STORED
                archive.writestr(name, content, method)
        return path

    return build


#: What the code of an archive might try; none of it is known to the interpreter, which then reads the tensors alone.
TRIES: Mapping[str, tuple[str, ...]] = {
    "imports": ("import os",),
    "imports a module": (f"import {FOREIGN}",),
    "calls exec": (f"exec('{TOKEN}')",),
    "calls eval": (f"y = eval('{TOKEN}')",),
    "calls open": (f"y = open('{TOKEN}', 'w')",),
    "calls os.system": (f"y = os.system('touch {TOKEN}')",),
    "calls __import__": ("y = __import__('os')",),
    "reaches for classes": ("y = self.__class__.__mro__",),
    "reaches for globals": ("y = self.forward.__globals__",),
    "reaches for attributes by name": ("y = getattr(x, '__class__')",),
    "formats its way to attributes": ("y = torch.format('{0.__class__}', x)",),
    "saves a tensor": (f"y = torch.save(x, '{TOKEN}')",),
    "loads a tensor": (f"y = torch.load('{TOKEN}')",),
    "maps a file": (f"y = torch.from_file('{TOKEN}', True, 100)",),
    "calls a custom operator": ("y = ops.evil.run(x)",),
    "loads a library": (f"y = torch.ops.load_library('{TOKEN}')",),
    "makes a class": ("y = type('A', (), {})",),
    "makes a lambda": ("y = (lambda: 1)()",),
    "deletes": ("del x",),
    "raises": (f"ops.prim.RaiseException('{TOKEN}')",),
    # --- and what costs
    "compares lists of 2^40": ("s = [1]", "for i in range(40):", "  s = [s, s]", "y = torch.eq(s, s)"),
    "prints lists of 2^40": ("s = [1]", "for i in range(40):", "  s = [s, s]", "y = str(s)"),
    "formats a text of 2^40": ("y = torch.remainder('%1099511627776d', 5)",),
    "doubles a list in place": ("s = [1, 2]", "for i in range(60):", "  torch.extend(s, s)"),
    "calls itself": ("y = self.forward(x)",),
    "doubles a text": ("s = 'aaaaaaaa'", "for i in range(60):", "  s = torch.add(s, s)"),
    "doubles a list": ("s = [1, 2]", "for i in range(60):", "  s = torch.add(s, s)"),
    "repeats a list": ("s = torch.mul([1, 2], 1000000000000)",),
    "repeats a text": ("s = torch.mul('ab', 1000000000000)",),
    "squares a number": ("n = 3", "for i in range(60):", "  n = torch.mul(n, n)"),
    "takes a power": ("n = torch.pow(10, 10000000000)",),
    "shifts a number": ("n = torch.__lshift__(1, 100000000000)",),
    "loops over a range of 10^30": (f"for i in range({10**30}):", "  y = 1"),
    "loops over a range of 10^12": (f"for i in range({10**12}):", "  y = 1"),
    "splits into 10^9 tensors": (
        "y = torch.unbind(torch.expand(torch.unsqueeze(x, 0), [1000000000, -1, -1]), 0)",
    ),
    "loops over 10^9 rows": ("for y in torch.expand(x, [1000000000, -1]):", "  z = y"),
    "makes a tensor of 2^60": ("y = torch.zeros([1073741824, 1073741824])",),
    "makes a window of 2^40": ("y = torch.hann_window(1099511627776)",),
    "writes a number of 10 000 digits": ("y = " + "9" * 10_000,),
    "negates 3000 times": ("y = " + "-" * 3000 + "1",),
    "nests 150 brackets": ("y = " + "(" * 150 + "1" + ")" * 150,),
    "nests 10 000 brackets": ("y = " + "(" * 10_000,),
    "adds 20 000 terms": ("y = " + "+".join(["1"] * 20_000),),
    "is of 10 000 attributes": ("y = self" + ".a" * 10_000,),
    "has a name with NUL": ("y = self.a\0b",),
}


def typed(annotation: str) -> str:
    return HEAD.replace("x: Tensor", f"x: {annotation}") + RESULT


def named(cls: bytes) -> bytes:
    return ROOT.replace(b"c__torch__.nets\nNet\n", b"\x8c" + bytes([len(cls)]) + cls + b"\x8c\1N\x93")


# --- exported programs -----------------------------------------------------------------------------------------


def meta(*sizes: int) -> dict[str, Any]:
    """What a .pt2 says about a float32 tensor."""
    strides = [4, 1][-len(sizes) :]
    return {
        "dtype": 7,
        "requires_grad": False,
        "device": {"type": "cpu", "index": None},
        "layout": 7,
        "sizes": [{"as_int": size} for size in sizes],
        "strides": [{"as_int": step} for step in strides],
        "storage_offset": {"as_int": 0},
    }


def node(target: str, name: str, *arguments: Any) -> dict[str, Any]:
    inputs = [{"name": f"a{place}", "arg": argument, "kind": 1} for place, argument in enumerate(arguments)]
    return {"target": target, "inputs": inputs, "outputs": [{"as_tensor": {"name": name}}], "metadata": {}}


def reference(name: str) -> dict[str, Any]:
    return {"as_tensor": {"name": name}}


MATMUL = "torch.ops.aten.mm.default"


def program(*nodes: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON of ``x @ w`` with more nodes before it."""
    values = {"x": meta(1, 4), "p_w": meta(4, 4), "y": meta(1, 4), "z": meta(1, 4)}
    specs = [
        {"parameter": {"arg": {"name": "p_w"}, "parameter_name": "w"}},
        {"user_input": {"arg": reference("x")}},
    ]
    graph = {
        "inputs": [reference("p_w"), reference("x")],
        "outputs": [reference("y")],
        "nodes": [*nodes, node(MATMUL, "y", reference("x"), reference("p_w"))],
        "tensor_values": values,
    }
    return {"graph_module": {"graph": graph, "signature": {"input_specs": specs, "output_specs": []}}}


def exported(document: Callable[[], bytes], entry: Mapping[str, Any] | None = None, **more: bytes) -> Build:
    """A .pt2 archive around a graph and a table of weights."""

    def build(folder: Path) -> Path:
        table = {"path_name": "weight_0", "is_param": True, "use_pickle": False, "tensor_meta": meta(4, 4)}
        config = {"config": {"w": {**table, **(entry or {})}}}
        records = {
            "net/data/weights/weight_0": WEIGHT.tobytes(),
            "net/data/weights/model_weights_config.json": json.dumps(config).encode(),
            "net/models/model.json": document(),
            "net/archive_format": b"pt2",
            "net/archive_version": b"0",
            **{f"net/{name}": content for name, content in more.items()},
        }
        (folder / "net.pt2").write_bytes(zip_bytes(records))
        return folder / "net.pt2"

    return build


def graph(*nodes: Mapping[str, Any]) -> Callable[[], bytes]:
    return lambda: json.dumps(program(*nodes)).encode()


def many(count: int) -> bytes:
    one = json.dumps(node("torch.ops.aten.relu.default", "z", reference("x")))
    whole = json.dumps(program())
    return whole.replace('"nodes": [', '"nodes": [' + f"{one}, " * count, 1).encode()


FILE = {"as_string": TOKEN}
ATTACKS = [
    *(Attack(f"torchscript that {name}", script(*lines), shape="1x4") for name, lines in TRIES.items()),
    Attack(
        "torchscript that loops without end",
        script("while True:", "  y = 1"),
        shape="1x4",
        seconds=60,
        slow=True,
    ),
    Attack(
        "torchscript of too much code",
        script(code=lambda: "x=1\n" * 300_000),
        refused="limit code_bytes = 1,048,576",
    ),
    Attack(
        "torchscript of 1 MB of code",
        script(code=lambda: f"{HEAD}{LINE * 100_000}{RESULT}"),
        shape="1x4",
        seconds=60,
        slow=True,
    ),
    Attack(
        "torchscript of 1 MB of numbers",
        script(code=lambda: f"{HEAD}    y = [{'1,' * 500_000}]\n{RESULT}"),
        shape="1x4",
        seconds=60,
        slow=True,
    ),
    Attack(
        "torchscript with a deep type",
        script(code=lambda: typed("List[" * 90 + "int" + "]" * 90)),
        shape="1x4",
    ),
    Attack("torchscript with a type that runs", script(code=lambda: typed(f"exec('{TOKEN}')")), shape="1x4"),
    Attack("torchscript with a class of NUL", script(root=named(b"__torch__.ne\0ts")), shape="1x4"),
    Attack("torchscript with a class of builtins", script(root=named(b"builtins.exec")), shape="1x4"),
    Attack(
        "torchscript whose pickle runs",
        script(root=ROOT.replace(b"\x89", b"cos\nsystem\n" + text(TOKEN) + b"\x85R", 1)),
        shape="1x4",
    ),
    Attack(
        "torchscript that is no text",
        script(code=lambda: "\udcff".encode("utf-8", "surrogatepass").decode("latin1")),
        shape="1x4",
    ),
    # --- exported programs
    Attack("pt2 that is honest", exported(graph())),
    *(
        Attack(f"pt2 that calls {target}", exported(graph(node(target, "z", FILE, reference("x")))))
        for target in (
            "os.system",
            "torch.ops.aten.from_file.default",
            "torch.load",
            "_operator.exec",
            "torch.ops.evil.run",
        )
    ),
    Attack(
        "pt2 that calls an operator on no tensor",
        exported(graph(node("torch.ops.aten.zeros.default", "z", {"as_ints": [2**31, 2**31]}))),
    ),
    Attack(
        "pt2 whose constants grow",
        exported(
            graph(
                node("torch.ops.aten.expand.default", "z", reference("p_w"), {"as_ints": [2**40, 4, 4]}),
                node(MATMUL, "z", reference("x"), reference("z")),
            )
        ),
    ),
    Attack(
        "pt2 that reads what nobody writes",
        exported(graph(node(MATMUL, "z", reference("gone"), reference("x")))),
    ),
    Attack(
        "pt2 with a graph of many nodes",
        exported(lambda: many(200)),
        refused="limit nodes = 100",
        options=("--limit", "nodes=100"),
    ),
    Attack(
        "pt2 with a graph of 300 000 nodes",
        exported(lambda: many(300_000)),
        refused="limit nodes = 250,000",
        seconds=60,
        slow=True,
    ),
    Attack(
        "pt2 with a graph 100 000 deep",
        exported(lambda: b'{"graph_module":' + b"[" * 10**5),
        refused="nested too deeply",
    ),
    Attack(
        "pt2 with a graph of 6 million values",
        exported(lambda: b'{"a":[' + b"[]," * 3_000_000 + b"0]}"),
        refused="limit json_values",
    ),
    Attack("pt2 with a graph that is no object", exported(lambda: b"[]"), refused="is a JSON list"),
    Attack("pt2 with a key twice", exported(lambda: b'{"a":1,"a":2}'), refused="has the key 'a' twice"),
    Attack(
        "pt2 with a weight in another record",
        exported(graph(), {"path_name": "../../models/model.json"}),
        refused="no record",
    ),
    Attack(
        "pt2 with a weight of negative size",
        exported(graph(), {"tensor_meta": meta(-4, 4)}),
        refused="without file, type",
    ),
    Attack(
        "pt2 with a weight of 2^62",
        exported(graph(), {"tensor_meta": meta(2**62, 4)}),
        refused="of a storage that has 64",
    ),
    Attack(
        "pt2 with a pickled weight",
        exported(graph(), {"use_pickle": True}),
        lost="cannot be read: stored as a pickled tensor subclass",
    ),
]
