"""The matrices inside ONNX recurrent layers: one per gate, direction, and input or state."""

from __future__ import annotations

from spectool.graph.onnx.state import Operation, State

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
"""Gates per layer, stacked along the rows of both weights (LSTM: i, o, f, c; GRU: z, r, h)."""


def recurrent(state: State, operation: Operation) -> None:
    """Explain an LSTM, GRU or RNN by rows for its matrices; the layer as a whole is a boundary.

    Weights are (directions, gates·hidden, input) and (directions, gates·hidden, hidden). Peepholes are diagonal
    and get no row.
    """
    kind = operation.kind.lower()
    count = GATES[operation.kind]
    for position in (1, 2):
        weight = operation.input(position)
        if not state.constant(weight):
            continue
        shape = state.constants[weight].shape
        if len(shape) != 3 or shape[1] % count:
            state.skip(operation, weight, kind, f"its weight has shape {'x'.join(map(str, shape))}")
            continue
        hidden = shape[1] // count
        for direction in range(shape[0]):
            for gate in range(count):
                block = ((direction, direction + 1), (gate * hidden, (gate + 1) * hidden))
                state.attach_matrix(operation, weight, kind, block=block)
    state.emit(operation.boundary())
