"""Check that a bundle's graph makes ONNX Runtime read only its own weights, and no other file of the device.

An ONNX tensor may refer to a file that holds its numbers. For the initializers of the main graph, the runtime takes the weights
that we give it in memory. For constants in functions and branches, for attributes and for sparse tensors, it opens files itself.
The content of such a file could leave the device in an error message. So every tensor of a graph is checked before the runtime
loads the graph.
"""

from __future__ import annotations

from ota.delta.wire import fields, varint
from ota.errors import DeviceError
from ota.manifest import WEIGHTS_LOCATION

# The fields of each message that hold other messages (onnx.proto, IR version 11). "initializer" is a tensor of the main graph.
INSIDE: dict[str, dict[int, str]] = {
    "model": {7: "main", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "main": {1: "node", 5: "initializer", 15: "sparse"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
EXTERNAL_DATA, DATA_LOCATION = 13, 14  # fields of a tensor


def check_graph(graph: bytes) -> None:
    """Refuse a graph that refers to a file, other than to the bundle's weights for its own initializers.

    Raises:
        DeviceError: the graph refers to another file, or is not an ONNX file.
    """
    waiting = [("model", 0, len(graph))]
    try:
        while waiting:
            kind, start, stop = waiting.pop()
            inside = INSIDE.get(kind)
            if inside is None:
                _check_tensor(graph, start, stop, kind == "initializer")
                continue
            for number, first, last in fields(graph, start, stop):
                if number in inside:
                    waiting.append((inside[number], first, last))
    except (ValueError, IndexError) as error:
        raise DeviceError("the bundle's graph is not an ONNX file") from error


def _check_tensor(graph: bytes, start: int, stop: int, own: bool) -> None:
    for number, first, last in fields(graph, start, stop):
        outside = number == EXTERNAL_DATA or (number == DATA_LOCATION and varint(graph, first, stop)[0])
        if outside and not own:
            raise DeviceError(
                "the bundle's graph names a file in a constant, a branch or a function; a graph must not read files there"
            )
        if number == EXTERNAL_DATA:
            said = {n: graph[a:b] for n, a, b in fields(graph, first, last)}
            if said.get(1) == b"location" and said.get(2) != WEIGHTS_LOCATION.encode():
                raise DeviceError(
                    f"the bundle's graph names the file {said.get(2, b'').decode(errors='replace')!r}; a graph must not read "
                    "other files than its weights"
                )
