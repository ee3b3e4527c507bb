from onnx import helper, numpy_helper
from attack import WEIGHT
import onnx
ATTACKS=[]
def linear():
    weight = numpy_helper.from_array(WEIGHT, "w")
    info = [helper.make_tensor_value_info(name, 1, (1, 4)) for name in "xy"]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "net", info[:1], info[1:], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
