"""The network as an ONNX graph, built once for each (configuration, precision) and never traced or re-exported.

`Block` and its parts are model-local functions: the file defines the fixed-size block once for all M instances. A single layer
calls `Block`, a dual layer calls the parts for each of its two streams. The weights are not in the graph. They lie in one flat
file (`WEIGHTS_FILE`), at offsets that depend on configuration and precision alone: a shell record, then M equal block records,
in each of which an expert is one contiguous range. So two trainings of one configuration share the graph byte for byte, and
their weight files differ only where weights differ.

The graph is written with `onnx.helper` because PyTorch's exporter renames, folds and de-duplicates weights by their values, which
would move bytes from one release to the next.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from onnx import FunctionProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from model.config import BYTE_VOCABULARY, ModelConfig, PrecisionName
from model.network import NORM_EPS, RATES, TIME_FREQUENCIES

OPSET = 20
IR_VERSION = 10
DOMAIN = "deltaferry"
WEIGHTS_FILE = "weights.bin"
TENSOR_ALIGNMENT = 64  # bytes; the size of a cache line, enough for any vector register
RECORD_ALIGNMENT = 4096  # bytes; a page, so that a record can be mapped or patched alone

# Stored type → its ONNX type and its bytes per number.
STORED: dict[str, tuple[int, int]] = {
    "float32": (TensorProto.FLOAT, 4), "float16": (TensorProto.FLOAT16, 2), "bfloat16": (TensorProto.BFLOAT16, 2),
    "int8": (TensorProto.INT8, 1),
}  # fmt: skip
# Tensors that the precision int8 stores as int8, and the axis that has a scale for each index: the outputs of a matrix product,
# or the rows of the byte table. All other tensors are small and stay float32.
SCALED_AXIS = {
    "qkv": 1, "out": 1, "s13": 1, "s2": 1, "w13": 1, "w2": 1, "text": 0, "pool.weight": 0, "time_in.weight": 0, "time_out.weight": 0,
    "ada.weight": 0,
}  # fmt: skip
SCALE = ".scale"
# The rows of a block's adaLN vector, each [B, 1, D]; "open" is the gate by which a branch is multiplied before it is added.
MOD = ["shift1", "scale1", "open1", "shift2", "scale2", "open2"]
# Inputs that describe the tokens to the experts: how many tokens each expert takes [1], the first row of each image in the
# flattened batch [B, 1, 1], and the shape before flattening [3].
SEGMENT = ["capacity", "start", "map"]


@dataclass(frozen=True)
class Tensor:
    """Place of one tensor in the weight file."""

    name: str
    shape: tuple[int, ...]
    offset: int
    length: int  # bytes
    stored: PrecisionName

    @property
    def in_graph(self) -> str:
        """Name of the stored numbers in the graph, which makes the tensor itself from them unless they are float32."""
        return self.name if self.stored == "float32" else f"{self.name}.stored"


def scaled_axis(name: str) -> int | None:
    """Return the axis that has scales when a tensor is stored as int8; None: the tensor is then stored as float32."""
    return SCALED_AXIS.get(re.sub(r"^(block\d+\.)?(expert\d+\.)?", "", name))


def block_tensors(config: ModelConfig) -> list[tuple[str, tuple[int, ...]]]:
    """List the names and shapes of the tensors of one block record, in file order."""
    s = config.shape
    D, d = s.width, s.width // s.heads
    rows: list[tuple[str, tuple[int, ...]]] = [
        ("mod", (6, D)), ("qkv", (D, 3 * D)), ("out", (D, D)), ("q_gain", (d,)), ("k_gain", (d,)), ("dw", (D, 1, 3, 3)),
        ("gate", (D, s.experts)), ("gate_bias", (s.experts,)), ("s13", (D, 2 * s.shared_width)), ("s2", (s.shared_width, D)),
    ]  # fmt: skip
    for e in range(s.experts):
        rows += [(f"expert{e}.w13", (D, 2 * s.expert_width)), (f"expert{e}.w2", (s.expert_width, D))]
    return rows


def shell_tensors(config: ModelConfig) -> list[tuple[str, tuple[int, ...]]]:
    """List the names and shapes of the tensors outside the blocks, in file order."""
    D, C, s = config.shape.width, config.channels, config.stride
    return [
        ("stem.weight", (D, C, 3, 3)), ("stem.bias", (D,)), ("text", (BYTE_VOCABULARY, D)),
        ("pool.weight", (D, D)), ("pool.bias", (D,)), ("time_in.weight", (D, 4 * TIME_FREQUENCIES)), ("time_in.bias", (D,)),
        ("time_out.weight", (D, D)), ("time_out.bias", (D,)), ("ada.weight", (6 * D, D)), ("ada.bias", (6 * D,)),
        ("head_mod", (2, D)), ("head.weight", (C * s * s, D, 3, 3)), ("head.bias", (C * s * s,)),
    ]  # fmt: skip


def layout(config: ModelConfig, precision: PrecisionName) -> tuple[list[Tensor], int]:
    """Compute every tensor's place in the weight file, and the file's size in bytes.

    With int8, every scaled tensor is followed by its scales, which are named after it.
    """
    placed: list[Tensor] = []

    def put(name: str, shape: tuple[int, ...], stored: PrecisionName, start: int) -> int:
        start = align(start, TENSOR_ALIGNMENT)
        placed.append(Tensor(name, shape, start, STORED[stored][1] * math.prod(shape), stored))
        return start + placed[-1].length

    def place(prefix: str, rows: list[tuple[str, tuple[int, ...]]], start: int) -> int:
        for name, shape in rows:
            axis = scaled_axis(name)
            if precision != "int8":
                start = put(prefix + name, shape, precision, start)
            elif axis is None:
                start = put(prefix + name, shape, "float32", start)
            else:
                start = put(prefix + name, shape, "int8", start)
                start = put(prefix + name + SCALE, (shape[axis],), "float32", start)
        return align(start, RECORD_ALIGNMENT)

    end = place("", shell_tensors(config), 0)
    for b in range(config.blocks):
        end = place(f"block{b}.", block_tensors(config), end)
    return placed, end


def align(offset: int, to: int) -> int:
    """Round `offset` up to a multiple of `to`."""
    return -(-offset // to) * to


class _Body:
    """Nodes of a graph or function under construction; the methods add nodes and return the names of their outputs."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.count = 0

    def name(self, hint: str) -> str:
        self.count += 1
        return f"{hint}_{self.count}"

    def add(
        self, op: str, inputs: Sequence[str], outputs: Sequence[str] | None = None, domain: str = "", **attributes: Any
    ) -> str:
        """Add one node; its output is named after the operator unless `outputs` are given."""
        made = list(outputs) if outputs else [self.name(op.lower())]
        self.nodes.append(helper.make_node(op, list(inputs), made, domain=domain, **attributes))
        return made[0]

    def ints(self, *values: int) -> str:
        """Add a constant int64 vector."""
        return self.add("Constant", [], value_ints=list(values))

    def number(self, value: float) -> str:
        """Add a constant float32 scalar."""
        return self.add("Constant", [], value_float=value)

    def slice(self, x: str, start: int, stop: int, axis: int) -> str:
        return self.add("Slice", [x, self.ints(start), self.ints(stop), self.ints(axis)])

    def swiglu(self, x: str) -> str:
        """Split the last axis in two and gate one half by the other, [..., 2H] -> [..., H]."""
        gate, value = self.name("gate"), self.name("value")
        self.add("Split", [x], [gate, value], axis=-1, num_outputs=2)
        return self.add("Mul", [self.add("Mul", [gate, self.add("Sigmoid", [gate])]), value])

    def silu(self, x: str) -> str:
        return self.add("Mul", [x, self.add("Sigmoid", [x])])

    def modulated_norm(self, x: str, ones: str, shift: str, scale: str, outputs: Sequence[str] | None = None) -> str:
        """Add a LayerNorm without parameters, times 1 + scale (passed as one tensor [B, 1, D]), plus shift [B, 1, D]."""
        normed = self.add("LayerNormalization", [x, ones], axis=-1, epsilon=NORM_EPS)
        return self.add("Add", [self.add("Mul", [normed, scale]), shift], outputs)

    def rms_norm(self, x: str, gain: str, outputs: Sequence[str] | None = None) -> str:
        """Add an RMS normalisation in the form that ONNX Runtime fuses into one kernel (the square as a power)."""
        mean = self.add("ReduceMean", [self.add("Pow", [x, self.number(2.0)]), self.ints(-1)], keepdims=1)
        root = self.add("Sqrt", [self.add("Add", [mean, self.number(NORM_EPS)])])
        return self.add("Mul", [self.add("Div", [x, root]), gain], outputs)

    def parts(self, x: str, count: int) -> list[str]:
        """Split a tensor into equal parts along the first axis, and return their names."""
        made = [self.name("part") for _ in range(count)]
        self.add("Split", [x], made, axis=0, num_outputs=count)
        return made

    def each_expert(self, config: ModelConfig, x: str, weight: str) -> str:
        """Multiply rows x [E * n, in], n for each expert, by the experts' own matrices: [E * n, out]."""
        parts = self.parts(x, config.shape.experts)
        return self.add("Concat", [self.add("MatMul", [part, f"{weight}_{e}"]) for e, part in enumerate(parts)], axis=0)

    def linear(self, x: str, name: str) -> str:
        """Multiply x [B, in] by a torch-style weight [out, in] and add its bias."""
        return self.add("Gemm", [x, f"{name}.weight", f"{name}.bias"], transB=1)


def _function(name: str, inputs: list[str], outputs: list[str], body: _Body) -> FunctionProto:
    imports = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_function(DOMAIN, name, inputs, outputs, body.nodes, imports)


def _project(config: ModelConfig) -> FunctionProto:
    """Build the function `Project`: x [B, T, D] → q, k, v, each [B, h, T, d]."""
    heads = config.shape.heads
    f = _Body()
    product = f.add("MatMul", [f.modulated_norm("x", "ones", "shift", "scale"), "qkv"])  # [B, T, 3D]
    grouped = f.add("Reshape", [product, f.ints(0, 0, 3 * heads, -1)])
    f.add("Split", [f.add("Transpose", [grouped], perm=[0, 2, 1, 3])], ["q0", "k0", "v"], axis=1, num_outputs=3)
    f.rms_norm("q0", "q_gain", ["q"])
    f.rms_norm("k0", "k_gain", ["k"])
    return _function("Project", ["x", "shift", "scale", "qkv", "q_gain", "k_gain", "ones"], ["q", "k", "v"], f)


def _attend(config: ModelConfig) -> FunctionProto:
    """Build the function `Attend`: q, k, v [B, h, T, d] → [B, T, D]."""
    d = config.shape.width // config.shape.heads
    f = _Body()
    scaled = f.add("Mul", ["q", f.number(d**-0.5)])
    weights = f.add("Softmax", [f.add("MatMul", [scaled, f.add("Transpose", ["k"], perm=[0, 1, 3, 2])])], axis=-1)
    merged = f.add("Transpose", [f.add("MatMul", [weights, "v"])], perm=[0, 2, 1, 3])
    f.add("Reshape", [merged, f.ints(0, 0, -1)], ["y"])
    return _function("Attend", ["q", "k", "v"], ["y"], f)


def _residual() -> FunctionProto:
    """Build the function `Residual`: x, attended [B, T, D] → stream after attention, and its norm for convolution and experts."""
    f = _Body()
    f.add("Add", ["x", f.add("Mul", ["open", f.add("MatMul", ["attended", "out"])])], ["y"])
    f.modulated_norm("y", "ones", "shift", "scale", ["h"])
    return _function("Residual", ["x", "attended", "open", "shift", "scale", "out", "ones"], ["y", "h"], f)


def _convolve(config: ModelConfig) -> FunctionProto:
    """Build the function `Convolve`: h [B, n, D] → h + its depthwise 3x3 convolution; `size` is [0, D, rows, columns]."""
    D = config.shape.width
    f = _Body()
    grid = f.add("Reshape", [f.add("Transpose", ["h"], perm=[0, 2, 1]), "size"])
    conv = f.add("Conv", [grid, "dw"], kernel_shape=[3, 3], pads=[1, 1, 1, 1], group=D)
    back = f.add("Transpose", [f.add("Reshape", [conv, f.ints(0, D, -1)])], perm=[0, 2, 1])
    f.add("Add", ["h", back], ["y"])
    return _function("Convolve", ["h", "dw", "size"], ["y"], f)


def _experts(config: ModelConfig) -> FunctionProto:
    """Build the function `Experts`: shared and routed experts on h [B, T, D], added to x [B, T, D].

    Its outputs are y [B, T, D], mass [B, E] and chosen (see `Experts.forward`). The mass of an expert is its load
    times the number of tokens.
    """
    f = _Body()
    flat = f.add("Reshape", ["h", f.ints(-1, config.shape.width)])
    mixed = f.add("MatMul", [f.swiglu(f.add("MatMul", [flat, "s13"])), "s2"])  # [B * T, D]
    route = _by_token if config.router == "token-choice" else _by_expert
    shaped = f.add("Reshape", [route(f, config, flat, mixed), "map"])
    f.add("Add", ["x", f.add("Mul", ["open", shaped])], ["y"])
    inputs = ["x", "h", "open", *_routing_weights(config), *SEGMENT, *_expert_names(config, "{w}_{e}")]
    return _function("Experts", inputs, ["y", "mass", "chosen"], f)


def _by_expert(f: _Body, config: ModelConfig, flat: str, mixed: str) -> str:
    """Add the routed experts to `mixed` [B * T, D] by expert choice: each expert takes its C tokens.

    The added nodes also compute the outputs mass [B, E] and chosen [B, E, C].
    """
    scores = f.add("Transpose", [f.add("Softmax", [f.add("MatMul", ["h", "gate"])], axis=-1)], perm=[0, 2, 1])
    f.add("TopK", [scores, "capacity"], ["weight", "chosen"], axis=-1, largest=1, sorted=1)  # [B, E, C]
    f.add("ReduceSum", ["weight", f.ints(-1)], ["mass"], keepdims=0)
    # Rows of the flattened [B * T, D] batch, expert by expert: an expert's work is then two plain matrix products over
    # the tokens that it chose, and everything between them is done for all experts at once.
    rows = f.add("Transpose", [f.add("Add", ["chosen", "start"])], perm=[1, 0, 2])  # [E, B, C]
    rows = f.add("Reshape", [rows, f.ints(-1, 1)])
    share = f.add("Reshape", [f.add("Transpose", ["weight"], perm=[1, 0, 2]), f.ints(-1, 1)])  # [E * B * C, 1]
    picked = f.add("GatherND", [flat, rows])  # [E * B * C, D]
    hidden = f.swiglu(f.each_expert(config, picked, "w13"))
    made = f.add("Mul", [f.each_expert(config, hidden, "w2"), share])
    # One addition per expert: no row occurs in it twice, so threads never add to the same row.
    for target, part in zip(f.parts(rows, config.shape.experts), f.parts(made, config.shape.experts), strict=True):
        mixed = f.add("ScatterND", [mixed, target, part], reduction="add")
    return mixed


def _by_token(f: _Body, config: ModelConfig, flat: str, mixed: str) -> str:
    """Add the routed experts to `mixed` [B * T, D] by token choice: each token takes its k experts.

    The added nodes also compute the outputs mass [B, E] and chosen [B, T, k].
    """
    scores = f.add("Softmax", [f.add("MatMul", ["h", "gate"])], axis=-1)  # [B, T, E]
    best = f.name("best")
    f.add(
        "TopK", [f.add("Add", [scores, "gate_bias"]), f.ints(config.shape.active)], [best, "chosen"], axis=-1, largest=1, sorted=1
    )
    taken = f.add("GatherElements", [scores, "chosen"], axis=2)  # the bias affects the choice, not the weight
    weight = f.add("ScatterElements", [f.add("Sub", [scores, scores]), "chosen", taken], axis=2)  # [B, T, E]
    f.add("ReduceSum", [weight, f.ints(1)], ["mass"], keepdims=0)
    shares = f.add("Reshape", [weight, f.ints(-1, config.shape.experts)])  # [B * T, E]
    for e in range(config.shape.experts):
        column = f.add("Gather", [shares, f.add("Constant", [], value_int=e)], axis=1)  # [B * T]
        mine = f.add("Reshape", [f.add("NonZero", [column]), f.ints(-1)])
        made = f.add("MatMul", [f.swiglu(f.add("MatMul", [f.add("Gather", [flat, mine], axis=0), f"w13_{e}"])), f"w2_{e}"])
        target = f.add("Reshape", [mine, f.ints(-1, 1)])
        share = f.add("Reshape", [f.add("Gather", [column, mine], axis=0), f.ints(-1, 1)])
        mixed = f.add("ScatterND", [mixed, target, f.add("Mul", [made, share])], reduction="add")
    return mixed


def _routing_weights(config: ModelConfig) -> list[str]:
    """List the weights of the function `Experts` other than the experts; `gate_bias` only for token choice."""
    return ["gate", *(["gate_bias"] if config.router == "token-choice" else []), "s13", "s2"]


def _block_weights(config: ModelConfig) -> list[str]:
    """List the weights of the function `Block` other than the experts."""
    return ["qkv", "out", "q_gain", "k_gain", "dw", *_routing_weights(config)]


def _expert_names(config: ModelConfig, pattern: str) -> list[str]:
    return [pattern.format(e=e, w=w) for e in range(config.shape.experts) for w in ("w13", "w2")]


def _block(config: ModelConfig) -> FunctionProto:
    """Build the function `Block`, the single-stream block on [image | text], x [B, N + L, D]; dual layers call its parts."""
    N, L = config.tokens, config.text_length
    f = _Body()
    f.add("Project", ["x", *MOD[:2], "qkv", "q_gain", "k_gain", "ones"], ["q", "k", "v"], DOMAIN)
    f.add("Attend", ["q", "k", "v"], ["attended"], DOMAIN)
    f.add("Residual", ["x", "attended", *MOD[2:5], "out", "ones"], ["r", "h"], DOMAIN)
    f.add("Split", ["h", f.ints(N, L)], ["image", "text"], axis=1)
    image = f.add("Convolve", ["image", "dw", "image_size"], domain=DOMAIN)
    text = f.add("Convolve", ["text", "dw", "text_size"], domain=DOMAIN)
    both = f.add("Concat", [image, text], axis=1)
    weights = [*_routing_weights(config), *SEGMENT, *_expert_names(config, "{w}_{e}")]
    f.add("Experts", ["r", both, MOD[5], *weights], ["y", "mass", "chosen"], DOMAIN)
    inputs = ["x", *MOD, *_block_weights(config), "ones", "image_size", "text_size", *SEGMENT, *_expert_names(config, "{w}_{e}")]
    return _function("Block", inputs, ["y", "mass", "chosen"], f)


def _stored_weights(g: _Body, config: ModelConfig, precision: PrecisionName) -> list[TensorProto]:
    """List the tensors of the weight file, and add the nodes that make each float32 under its own name."""
    made: list[TensorProto] = []
    for tensor in layout(config, precision)[0]:
        if tensor.name.endswith("gate_bias") and config.router != "token-choice":
            continue
        stored = tensor.in_graph
        made.append(_external(stored, tensor))
        if tensor.stored == "int8":
            axis = scaled_axis(tensor.name)
            g.add("DequantizeLinear", [stored, tensor.name + SCALE], [tensor.name], axis=axis)
        elif stored != tensor.name:
            g.add("Cast", [stored], [tensor.name], to=TensorProto.FLOAT)
    return made


def _external(name: str, tensor: Tensor) -> TensorProto:
    """Describe a tensor that lies in the weight file."""
    made = TensorProto(name=name, data_type=STORED[tensor.stored][0], dims=tensor.shape)
    made.data_location = TensorProto.EXTERNAL
    for key, value in (("location", WEIGHTS_FILE), ("offset", str(tensor.offset)), ("length", str(tensor.length))):
        entry = made.external_data.add()
        entry.key, entry.value = key, value
    return made


def _constants(config: ModelConfig) -> list[TensorProto]:
    """List the constants that depend on the configuration alone."""
    D = config.shape.width
    return [
        helper.make_tensor("ones", TensorProto.FLOAT, [D], [1.0] * D),
        helper.make_tensor("rates", TensorProto.FLOAT, [1, TIME_FREQUENCIES], RATES),
        helper.make_tensor("image_size", TensorProto.INT64, [4], [0, D, config.side, config.side]),
        helper.make_tensor("text_size", TensorProto.INT64, [4], [0, D, 1, config.text_length]),
        helper.make_tensor("unit", TensorProto.FLOAT, [6, 1], [0.0, 1.0, 0.0, 0.0, 1.0, 0.0]),  # the 1 of 1 + scale
    ]


def _segments(g: _Body, config: ModelConfig) -> list[TensorProto]:
    """List the constants of `SEGMENT` for image, text and both together, and add the nodes that compute the others from t [B]."""
    made: list[TensorProto] = []
    order = g.add(
        "Range",
        [g.add("Constant", [], value_int=0), g.add("Squeeze", [g.add("Shape", ["t"])]), g.add("Constant", [], value_int=1)],
    )
    N, L = config.tokens, config.text_length
    for name, tokens in (("image", N), ("text", L), ("both", N + L)):
        made.append(helper.make_tensor(f"capacity_{name}", TensorProto.INT64, [1], [config.capacity(tokens)]))
        made.append(helper.make_tensor(f"map_{name}", TensorProto.INT64, [3], [-1, tokens, config.shape.width]))
        first = g.add("Mul", [order, g.add("Constant", [], value_int=tokens)])
        g.add("Reshape", [first, g.ints(-1, 1, 1)], [f"start_{name}"])
    return made


def _stem(g: _Body, config: ModelConfig) -> tuple[str, str]:
    """Add the initial convolution: x [B, C, R, R] → stem [B, D, side, side], and the same as tokens [B, N, D]."""
    stem = g.add("Conv", ["x", "stem.weight", "stem.bias"], kernel_shape=[3, 3], pads=[1] * 4, strides=[config.stride] * 2)
    return stem, g.add("Transpose", [g.add("Reshape", [stem, g.ints(0, config.shape.width, -1)])], perm=[0, 2, 1])


def _caption(g: _Body) -> tuple[str, str]:
    """Add the byte embeddings: ids [B, L] → text [B, L, D], and the mean of those that are not padding, projected [B, D]."""
    text = g.add("Gather", ["text", "ids"], axis=0)  # [B, L, D]
    given = g.add("Cast", [g.add("Greater", ["ids", g.add("Constant", [], value_int=0)])], to=TensorProto.FLOAT)
    count = g.add("Max", [g.add("ReduceSum", [given, g.ints(1)], keepdims=1), g.number(1.0)])  # [B, 1]
    masked = g.add("Mul", [text, g.add("Unsqueeze", [given, g.ints(-1)])])
    mean = g.add("Div", [g.add("ReduceSum", [masked, g.ints(1)], keepdims=0), count])
    return text, g.linear(mean, "pool")


def _condition(g: _Body, pooled: str) -> str:
    """Add what all blocks are conditioned on: the times t, r [B] and the pooled caption [B, D] → adaLN vector [B, 6 * D]."""
    angles = [g.add("Mul", [g.add("Unsqueeze", [t, g.ints(1)]), "rates"]) for t in ("t", "r")]
    waves = g.add("Concat", [g.add(op, [angle]) for angle in angles for op in ("Cos", "Sin")], axis=1)
    when = g.linear(g.silu(g.linear(waves, "time_in")), "time_out")  # [B, D]
    return g.linear(g.silu(g.add("Add", [when, pooled])), "ada")


def _modulate(g: _Body, config: ModelConfig, condition: str) -> None:
    """Add the adaLN vectors of all blocks at once (ONNX Runtime adds the constant parts when a session loads): see `_mods`."""
    ada = g.add("Reshape", [condition, g.ints(0, 1, 6, config.shape.width)])  # [B, 1, 6, D]
    own = [g.add("Unsqueeze", [g.add("Add", [f"block{b}.mod", "unit"]), g.ints(0)]) for b in range(config.blocks)]
    sums = g.add("Add", [ada, g.add("Concat", own, axis=0)])
    every = g.add("Reshape", [sums, g.ints(0, 6 * config.blocks, config.shape.width)])
    rows = [row for b in range(config.blocks) for row in _mods(b)]
    g.add("Split", [every], rows, axis=1, num_outputs=6 * config.blocks)


def _mods(b: int) -> list[str]:
    """List the names of the rows of block b's adaLN vector, in the order of `MOD`."""
    return [f"{row}_{b}" for row in MOD]


def _weights(b: int, *names: str) -> list[str]:
    """List weights of block b under the names that they have in the graph."""
    return [f"block{b}.{name}" for name in names]


def _experts_of(config: ModelConfig, b: int) -> list[str]:
    """List the weights of block b's experts under the names that they have in the graph."""
    return _expert_names(config, f"block{b}.expert{{e}}.{{w}}")


def _segment(name: str) -> list[str]:
    """List the names of the inputs `SEGMENT` for image, text or both."""
    return [f"{part}_{name}" for part in SEGMENT]


def _dual_layer(g: _Body, config: ModelConfig, layer: int, image: str, text: str) -> tuple[str, str]:
    """Add a dual layer, in which image [B, N, D] and text [B, L, D] have a block each and meet in the attention."""
    i, j = 2 * layer, 2 * layer + 1
    joined = [g.add("Concat", pair, axis=2) for pair in zip(_projected(g, i, image), _projected(g, j, text), strict=True)]
    attended = g.add("Attend", joined, domain=DOMAIN)  # [B, N + L, D]
    parts = [g.name("of_image"), g.name("of_text")]
    g.add("Split", [attended, g.ints(config.tokens, config.text_length)], parts, axis=1)
    return _stream(g, config, i, image, parts[0], "image"), _stream(g, config, j, text, parts[1], "text")


def _projected(g: _Body, b: int, x: str) -> list[str]:
    """Add the projections of one stream of a dual layer: x [B, T, D] → q, k, v, each [B, h, T, d]."""
    qkv = [f"q{b}", f"k{b}", f"v{b}"]
    g.add("Project", [x, *_mods(b)[:2], *_weights(b, "qkv", "q_gain", "k_gain"), "ones"], qkv, DOMAIN)
    return qkv


def _stream(g: _Body, config: ModelConfig, b: int, x: str, attended: str, name: str) -> str:
    """Add what follows the attention in one stream of a dual layer: x, attended [B, T, D] → [B, T, D]."""
    r, h = g.name("r"), g.name("h")
    g.add("Residual", [x, attended, *_mods(b)[2:5], *_weights(b, "out"), "ones"], [r, h], DOMAIN)
    conv = g.add("Convolve", [h, *_weights(b, "dw"), f"{name}_size"], domain=DOMAIN)
    weights = _weights(b, *_routing_weights(config))
    inputs = [r, conv, _mods(b)[5], *weights, *_segment(name), *_experts_of(config, b)]
    return g.add("Experts", inputs, [f"y{b}", f"mass{b}", f"chosen{b}"], DOMAIN)


def _single_layer(g: _Body, config: ModelConfig, b: int, both: str) -> str:
    """Add a single layer, in which one block serves image and text, both [B, N + L, D]."""
    maps = ["image_size", "text_size", *_segment("both")]
    inputs = [both, *_mods(b), *_weights(b, *_block_weights(config)), "ones", *maps, *_experts_of(config, b)]
    return g.add("Block", inputs, [f"y{b}", f"mass{b}", f"chosen{b}"], DOMAIN)


def _head(g: _Body, config: ModelConfig, image: str, stem: str, condition: str) -> None:
    """Add the head: image [B, N, D], added to stem [B, D, side, side] → output v [B, C, R, R]."""
    ends = g.add("Slice", [g.add("Reshape", [condition, g.ints(0, 6, config.shape.width)]), g.ints(0), g.ints(2), g.ints(1)])
    g.add(
        "Split",
        [g.add("Add", [ends, g.add("Add", ["head_mod", g.slice("unit", 0, 2, 0)])])],
        ["shift", "scale"],
        axis=1,
        num_outputs=2,
    )
    grid = g.add("Transpose", [g.modulated_norm(image, "ones", "shift", "scale")], perm=[0, 2, 1])
    skip = g.add("Add", [g.add("Reshape", [grid, "image_size"]), stem])
    head = g.add("Conv", [skip, "head.weight", "head.bias"], kernel_shape=[3, 3], pads=[1] * 4)
    g.add("DepthToSpace", [head], ["v"], blocksize=config.stride, mode="CRD")


def _load(g: _Body, config: ModelConfig) -> TensorProto:
    """Add the output load [B, M, E], each block's mass by the number of tokens that it sees; return these numbers."""
    masses = g.add("Concat", [f"mass{b}" for b in range(config.blocks)], axis=1)
    N, L = config.tokens, config.text_length
    seen = [N, L] * config.shape.dual + [N + L] * config.shape.single
    g.add("Div", [g.add("Reshape", [masses, g.ints(0, config.blocks, config.shape.experts)]), "seen"], ["load"])
    return helper.make_tensor("seen", TensorProto.FLOAT, [len(seen), 1], seen)


def _inputs(config: ModelConfig) -> list[ValueInfoProto]:
    """List the inputs of the graph."""
    C, R = config.channels, config.image_size
    return [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", C, R, R]),
        helper.make_tensor_value_info("t", TensorProto.FLOAT, ["B"]),
        helper.make_tensor_value_info("r", TensorProto.FLOAT, ["B"]),
        helper.make_tensor_value_info("ids", TensorProto.INT64, ["B", config.text_length]),
    ]


def _outputs(config: ModelConfig, routes: bool) -> list[ValueInfoProto]:
    """List the outputs of the graph, with each block's routing if `routes` is set."""
    C, R, s = config.channels, config.image_size, config.shape
    made: list[ValueInfoProto] = [
        helper.make_tensor_value_info("v", TensorProto.FLOAT, ["B", C, R, R]),
        helper.make_tensor_value_info("load", TensorProto.FLOAT, ["B", config.blocks, s.experts]),
    ]
    if routes:
        sizes = ["B", None, s.active] if config.router == "token-choice" else ["B", s.experts, None]
        made += [helper.make_tensor_value_info(f"chosen{b}", TensorProto.INT64, sizes) for b in range(config.blocks)]
    return made


def _model(g: _Body, config: ModelConfig, initializers: list[TensorProto], routes: bool) -> ModelProto:
    """Make the model: the graph of all nodes, and the functions that they call."""
    graph = helper.make_graph(g.nodes, "network", _inputs(config), _outputs(config, routes), initializers)
    functions = [_project(config), _attend(config), _residual(), _convolve(config), _experts(config), _block(config)]
    imports = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    # No producer version and no metadata: a new release of the tool must not change the bytes of an old graph.
    return helper.make_model(graph, functions=functions, opset_imports=imports, ir_version=IR_VERSION, producer_name="deltaferry")


def build(config: ModelConfig, precision: PrecisionName, routes: bool = False) -> ModelProto:
    """Build the graph: x [B, C, R, R], t [B], r [B], ids [B, L] → v [B, C, R, R], load [B, M, E].

    The bytes of the result depend on the arguments alone, and so on the order in which the steps add their nodes.

    Args:
        config: the network's shape.
        precision: how weights are stored; arithmetic is always float32 (the casts are folded when a session loads).
        routes: also output each block's routing as `chosen{b}`, for parity checks: [B, E, C] under expert choice, [B, T, k]
            under token choice.
    """
    g = _Body()
    initializers = [*_stored_weights(g, config, precision), *_constants(config), *_segments(g, config)]
    stem, image = _stem(g, config)
    text, pooled = _caption(g)
    condition = _condition(g, pooled)
    _modulate(g, config, condition)
    for layer in range(config.shape.dual):
        image, text = _dual_layer(g, config, layer, image, text)
    both = g.add("Concat", [image, text], axis=1)  # [B, N + L, D]
    for b in range(2 * config.shape.dual, config.blocks):
        both = _single_layer(g, config, b, both)
    _head(g, config, g.slice(both, 0, config.tokens, 1), stem, condition)
    initializers.append(_load(g, config))
    return _model(g, config, initializers, routes)
