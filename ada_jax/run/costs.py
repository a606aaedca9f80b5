"""Costs of a program: the operations it needs, and those and the HBM traffic when compiled.

XLA's own cost analysis takes a loop's body once, however often it runs, and counts what stays in a
TPU's on-chip memory with what goes to HBM. The two counts here multiply a loop's body by its
number of iterations:

* `useful_flops` walks a jaxpr: the multiplications and additions of the matrix products and
  convolutions that the wanted outputs need.
* `program_costs` walks a compiled program's text: those that the compiler's choice of algorithm
  really makes, and the bytes that go to or come from HBM.

Both leave out elementwise arithmetic, and in convolutions the products with padding.
"""

import collections
import math
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from jax.extend import core


def taps(
    size: int,
    kernel: int,
    out: int,
    *,
    stride: int = 1,
    before: int = 0,
    dilation: int = 1,
    kernel_dilation: int = 1,
) -> int:
    """Products of a convolution along one axis that meet neither padding nor a dilation's holes.

    Args:
      size: of the input, in pixels, as the others.
      kernel: of the window.
      out: of the output.
      stride: of the window.
      before: padding at the start.
      dilation: of the input.
      kernel_dilation: of the window.

    Returns:
      How many pairs of an output position and a window position have an input under them.
    """
    positions = (
        o * stride + k * kernel_dilation - before for o in range(out) for k in range(kernel)
    )
    return sum(0 <= p <= (size - 1) * dilation and p % dilation == 0 for p in positions)


# ------------------------------------------------------------------------------- a jaxpr


def useful_flops(jaxpr: core.ClosedJaxpr, platform: str = "tpu") -> float:
    """Floating-point operations of the matrix products and convolutions in a jaxpr.

    Args:
      jaxpr: from `jax.make_jaxpr`; what none of its outputs needs is left out.
      platform: whose branch `lax.platform_dependent` takes.

    Returns:
      Multiplications and additions; the body of a loop counts once per iteration, that of a `while`
      of unknown length once, and a `cond` as its most expensive branch.
    """
    return _count(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars), platform)[0]


def _count(jaxpr, wanted: Sequence[bool], platform: str) -> tuple[float, list[bool]]:
    """Flops for the wanted outputs, and which inputs they need."""
    live = {v for v, w in zip(jaxpr.outvars, wanted, strict=True) if w and _is_variable(v)}
    total = 0.0
    for eqn in reversed(jaxpr.eqns):
        outputs = [v in live for v in eqn.outvars]
        if any(outputs):
            flops, needed = _count_equation(eqn, outputs, platform)
            total += flops
            live |= {v for v, n in zip(eqn.invars, needed, strict=True) if n and _is_variable(v)}
    return total, [v in live for v in jaxpr.invars]


def _is_variable(v) -> bool:
    return not isinstance(v, core.Literal)


def _count_equation(eqn, wanted: list[bool], platform: str) -> tuple[float, list[bool]]:
    everything = [True] * len(eqn.invars)
    match eqn.primitive.name:
        case "dot_general":
            return _dot_flops(eqn), everything
        case "conv_general_dilated":
            return _conv_flops(eqn), everything
        case "pallas_call":
            return float(eqn.params["cost_estimate"].flops), everything
        case "scan":
            return _count_scan(eqn, wanted, platform)
        case "cond":
            counts = [_count(b.jaxpr, wanted, platform) for b in _branches(eqn, platform)]
            needed = [any(n) for n in zip(*(n for _, n in counts), strict=True)]
            return max(f for f, _ in counts), [True, *needed]
    inner = [j for j in map(_as_jaxpr, eqn.params.values()) if j is not None]
    if len(inner) == 1 and len(inner[0].outvars) == len(wanted):
        flops, needed = _count(inner[0], wanted, platform)
        return flops, needed if len(needed) == len(everything) else everything
    return sum(_count(j, [True] * len(j.outvars), platform)[0] for j in inner), everything


def _as_jaxpr(value):
    value = value.jaxpr if isinstance(value, core.ClosedJaxpr) else value
    return value if isinstance(value, core.Jaxpr) else None


def _branches(eqn, platform: str) -> Sequence[core.ClosedJaxpr]:
    branches, platforms = eqn.params["branches"], eqn.params.get("branches_platforms")
    if platforms is None:
        return branches
    # The default has None for its platforms, and comes last.
    named = (b for b, p in zip(branches, platforms, strict=True) if p is None or platform in p)
    return [next(named)]


def _count_scan(eqn, wanted: list[bool], platform: str) -> tuple[float, list[bool]]:
    # The parameters that say which inputs are carried have changed with JAX's versions; shapes have
    # not: what is scanned over or stacked up has a leading axis that the body does not see.
    body = eqn.params["jaxpr"]
    carried = sum(_same_rank(eqn.outvars, body.jaxpr.outvars))
    consts = sum(_same_rank(eqn.invars, body.jaxpr.invars)) - carried
    wanted = list(wanted)
    while True:  # A value carried along is wanted where the next iteration needs it.
        flops, needed = _count(body.jaxpr, wanted, platform)
        carry = needed[consts : consts + carried]
        if all(w or not n for w, n in zip(wanted[:carried], carry, strict=True)):
            return eqn.params["length"] * flops, needed
        wanted[:carried] = [w or n for w, n in zip(wanted[:carried], carry, strict=True)]


def _same_rank(outer: Sequence, inner: Sequence) -> list[bool]:
    return [len(o.aval.shape) == len(i.aval.shape) for o, i in zip(outer, inner, strict=True)]


def _dot_flops(eqn) -> float:
    lhs, (out,) = eqn.invars[0].aval.shape, eqn.outvars
    (contracted, _), _ = eqn.params["dimension_numbers"]
    return 2.0 * out.aval.size * math.prod(lhs[i] for i in contracted)


def _conv_flops(eqn) -> float:
    p, dims = eqn.params, eqn.params["dimension_numbers"]
    lhs, rhs, out = (v.aval.shape for v in (*eqn.invars, *eqn.outvars))
    products = lhs[dims.lhs_spec[0]] * rhs[dims.rhs_spec[0]] * rhs[dims.rhs_spec[1]]
    axes = zip(dims.lhs_spec[2:], dims.rhs_spec[2:], dims.out_spec[2:], strict=True)
    for axis, (i, k, o) in enumerate(axes):
        products *= taps(
            lhs[i],
            rhs[k],
            out[o],
            stride=p["window_strides"][axis],
            before=p["padding"][axis][0],
            dilation=p["lhs_dilation"][axis],
            kernel_dilation=p["rhs_dilation"][axis],
        )
    return 2.0 * products / p["batch_group_count"]


# ------------------------------------------------------------------------------- a program


class Costs(NamedTuple):
    """What a compiled program does on one core.

    Attributes:
      flops: multiplications and additions.
      traffic: bytes to and from HBM by what moves them, one of `KINDS`.
    """

    flops: float
    traffic: collections.Counter[str]

    @property
    def hbm_bytes(self) -> float:
        return float(self.traffic.total())


# What moves bytes, with what is fused into it.
KINDS = {
    "kernels": "per-example kernels",
    "products": "convolutions, products",
    "copies": "copies, layout changes",
    "others": "elementwise, sums",
}


class _Instruction(NamedTuple):
    """`[ROOT] name = shape op(inner)rest`; operands are the names in `inner`."""

    shape: str
    op: str
    operands: list[str]
    inner: str
    rest: str
    root: bool


_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z\d\-]*)\((.*?)\)(.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?")
_ESTIMATE = re.compile(r'"cost_estimate": ?\{([^}]*)\}')
# They move nothing themselves, or are the ends of what the '-start' before them moved.
_FREE = ("tuple", "get-tuple-element", "bitcast", "parameter", "constant", "after-all")
_SLICES = ("slice", "dynamic-slice")
_MOVES = (
    *_FREE,
    *_SLICES,
    *("broadcast", "concatenate", "copy", "copy-start", "dynamic-update-slice", "iota", "pad"),
    *("reshape", "reverse", "slice-start", "transpose"),
)
_CALLS = ("call", "conditional", "async-start")


def program_costs(text: str) -> Costs:
    """Arithmetic and HBM traffic of a scheduled HLO program.

    Every instruction reads its operands and writes its result once, of a slice only the part that
    is read or updated, and nothing of what the layout puts into on-chip memory ('S(1)'); tile
    padding is not counted. A Pallas kernel costs what its `pl.CostEstimate` says. A loop counts as
    often as its condition says, once where that cannot be read, and a conditional as its most
    expensive branch.

    Args:
      text: `jax.stages.Compiled.as_text()`.

    Returns:
      The costs.
    """
    entry, computations = _parse(text)
    known: dict[str, Costs] = {}

    def cost(name: str) -> Costs:
        if name not in known:
            body = computations[name]
            known[name] = _sum(_cost(i, body, computations, cost) for i in body.values())
        return known[name]

    return cost(entry)


def _parse(text: str) -> tuple[str, dict[str, dict[str, _Instruction]]]:
    entry, computations, body = "", {}, {}
    # Inside of fusions a kernel's configuration is printed on several lines.
    for line in re.sub(r'\n(?="|\}, )', "", text).splitlines():
        if header := _COMPUTATION.match(line):
            body = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif match := _INSTRUCTION.match(line):
            root, name, shape, op, inner, rest = match.groups()
            operands = re.findall(r"%([\w.\-]+)", inner)
            body[name] = _Instruction(shape, op, operands, inner, rest, bool(root))
    return entry, computations


def _sum(costs: Iterable[Costs], iterations: int = 1) -> Costs:
    flops, traffic = 0.0, collections.Counter()
    for c in costs:
        flops += iterations * c.flops
        traffic.update({kind: iterations * size for kind, size in c.traffic.items()})
    return Costs(flops, traffic)


def _cost(instruction: _Instruction, body, computations, cost) -> Costs:
    called = _called(instruction.rest)
    if instruction.op in _FREE or instruction.op.endswith(("-done", "-update")):
        return _sum([])
    if instruction.op == "while":
        iterations = _iterations(computations[called["condition"]], computations)
        return _sum([cost(called["body"])], iterations)
    if instruction.op == "conditional":
        branches = map(cost, _called_branches(instruction.rest))
        return max(branches, key=lambda branch: (branch.flops, branch.hbm_bytes))
    if estimate := _ESTIMATE.search(instruction.rest):
        arrays = [a for o in dict.fromkeys(instruction.operands) for a in _arrays(body[o].shape)]
        on_chip = sum(size for size, in_hbm in _arrays(instruction.shape) + arrays if not in_hbm)
        numbers = dict(re.findall(r'"(\w+)": ?"?(\d+)', estimate[1]))
        size = max(float(numbers["bytes_accessed"]) - on_chip, 0.0)
        return Costs(float(numbers["flops"]), collections.Counter(kernels=size))
    inner = [cost(n) for k, n in called.items() if k in ("calls", "to_apply") and n in computations]
    inner = _sum(inner)
    if instruction.op in _CALLS:
        return inner
    flops = inner.flops + _flops(instruction, body)
    if inner.traffic["kernels"]:
        kind = "kernels"
    elif flops:
        kind = "products"
    else:
        kind = "copies" if _only_copies(instruction, computations) else "others"
    return Costs(flops, collections.Counter({kind: _traffic(instruction, body, computations)}))


def _only_copies(instruction: _Instruction, computations) -> bool:
    """Whether an instruction or all of a fusion moves numbers and computes none."""
    if instruction.op == "fusion":
        inner = computations[_called(instruction.rest)["calls"]].values()
        return all(_only_copies(i, computations) for i in inner)
    return instruction.op in _MOVES


def _called(rest: str) -> dict[str, str]:
    return dict(re.findall(r"\b(condition|body|calls|to_apply)=%?([\w.\-]+)", rest))


def _called_branches(rest: str) -> list[str]:
    """The branches of a conditional over integers or over a boolean."""
    of_integers = re.findall(r"\bbranch_computations=\{([^}]*)\}", rest)
    of_boolean = re.findall(r"\b(?:true|false)_computation=%?([\w.\-]+)", rest)
    return re.findall(r"[\w.\-]+", "".join(of_integers)) + of_boolean


def _iterations(condition: dict[str, _Instruction], computations) -> int:
    """The one integer that the loop's counter is compared with, else 1."""
    called = [_called(i.rest).get("calls") for i in condition.values()]
    bodies = [condition, *(computations[name] for name in called if name)]
    numbers = {i.inner for b in bodies for i in b.values() if i.op == "constant"}
    return int(numbers.pop()) if len(numbers) == 1 and all(n.isdigit() for n in numbers) else 1


def _traffic(instruction: _Instruction, body, computations) -> float:
    results = _arrays(instruction.shape)
    operands = [a for o in instruction.operands if o in body for a in _arrays(body[o].shape)]
    if instruction.op in ("copy-start", "slice-start"):
        # (what arrives, where it comes from, a token), or the other way round.
        return min(size for size, _ in results[:2]) * sum(in_hbm for _, in_hbm in results[:2])
    if instruction.op == "custom-call" and "AllocateBuffer" in instruction.rest:
        return 0.0
    if instruction.op in _SLICES:
        return results[0][0] * (results[0][1] + operands[0][1])
    if instruction.op == "dynamic-update-slice":
        return operands[1][0] * (results[0][1] + operands[1][1])
    if instruction.op == "fusion":
        inner = computations[_called(instruction.rest)["calls"]]
        parts = [_touched(n, inner) for n, i in _parameters(inner)]
        if len(parts) == len(operands):
            operands = [
                (o[0] if p is None else p, o[1]) for o, p in zip(operands, parts, strict=True)
            ]
        (root,) = (i for i in inner.values() if i.root)
        if root.op == "dynamic-update-slice":
            results = [(_arrays(inner[root.operands[1]].shape)[0][0], results[0][1])]
    return sum(size for size, in_hbm in results + operands if in_hbm)


def _parameters(computation: dict[str, _Instruction]) -> list[tuple[str, _Instruction]]:
    """A computation's parameters in their order."""
    found = [(n, i) for n, i in computation.items() if i.op == "parameter"]
    return sorted(found, key=lambda parameter: int(parameter[1].inner))


def _touched(name: str, computation: dict[str, _Instruction]) -> float | None:
    """Bytes of a value that are read where only slices of it are used; None means all of it."""
    if computation[name].root:
        return None
    total = 0.0
    for user, instruction in computation.items():
        if name not in instruction.operands:
            continue
        if instruction.op in _SLICES:
            part = _arrays(instruction.shape)[0][0]
        elif instruction.op == "dynamic-update-slice" and instruction.operands[0] == name:
            part = 0.0  # it is updated in place
        elif instruction.op == "bitcast":
            part = _touched(user, computation)
        else:
            part = None
        if part is None:
            return None
        total += part
    return total


def _arrays(shape: str) -> list[tuple[float, bool]]:
    """Bytes of every array in a shape, and whether it is in HBM."""
    arrays = []
    for dtype, dims, layout in _ARRAY.findall(shape):
        bits = 8 if dtype == "pred" else int((re.search(r"\d+", dtype) or ["0"])[0])
        size = bits / 8 * math.prod(int(d) for d in dims.split(",") if d)
        arrays.append((size, "S(" not in layout))
    return arrays


def _flops(instruction: _Instruction, body) -> float:
    if instruction.op not in ("convolution", "dot"):
        return 0.0
    lhs, rhs = (_dims(body[o].shape) for o in instruction.operands[:2])
    out = _dims(instruction.shape)
    if instruction.op == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
        axes = [int(d) for d in contracted[1].split(",") if d] if contracted else []
        return 2.0 * math.prod(out) * math.prod(lhs[a] for a in axes)
    return _window_flops(instruction.rest, lhs, rhs, out)


def _dims(shape: str) -> list[int]:
    return [int(d) for d in _ARRAY.search(shape)[2].split(",") if d]


def _window_flops(rest: str, lhs: list[int], rhs: list[int], out: list[int]) -> float:
    """Of a convolution, from its attributes: 'window={size=3x3 pad=1_1x1_1}, dim_labels=...'."""
    window = re.search(r"window=\{([^}]*)\}", rest)
    window = dict(part.split("=") for part in window[1].split()) if window else {}
    groups = re.search(r"batch_group_count=(\d+)", rest)
    lhs_at, rhs_at, out_at = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", rest).groups()
    products = lhs[lhs_at.index("b")] * rhs[rhs_at.index("i")] * rhs[rhs_at.index("o")]
    for axis in range(len(lhs_at) - 2):
        of_axis = {key: value.split("x")[axis] for key, value in window.items()}
        products *= taps(
            lhs[lhs_at.index(str(axis))],
            rhs[rhs_at.index(str(axis))],
            out[out_at.index(str(axis))],
            stride=int(of_axis.get("stride", 1)),
            before=int(of_axis.get("pad", "0_0").split("_")[0]),
            dilation=int(of_axis.get("lhs_dilate", 1)),
            kernel_dilation=int(of_axis.get("rhs_dilate", 1)),
        )
    return 2.0 * products / (int(groups[1]) if groups else 1)
