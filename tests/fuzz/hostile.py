"""Hostile calls: a good call with up to two arguments made bad, and what must come of it.

A call returns what its operator's table says, or raises an error of few types whose message names
the operator. It never crashes or hangs, takes little memory, and writes into no input.
"""

import contextlib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .calls import DTYPES, OPERATORS, Call, good_call, lay_out, schemas

ERRORS = (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError)
# Arguments that an operator writes: they keep their layout, and a second call sees other values.
WRITES = {
    "_add_once": {"total"},
    "_expert_ffn_backward_into": {"into_gate_up_proj", "into_down_proj"},
}
# What torch raises before it reaches an operator, or for a tensor that has no values.
TORCHS_OWN = re.compile(
    r"NestedTensorImpl doesn't support|Could not run 'aten::|"
    r"Overflow when unpacking long|data is not allocated yet|doesn't have storage|"
    r"Inference tensors cannot be saved for backward|Cannot access (data|storage)|"
    r"Tried to convert a List with \d+ elements to a fixed-size array|"
    r"out of bounds for storage of size|DefaultCPUAllocator: can't allocate memory|"
    r"invalid gradient at index 0 - expected device"
)

# What may come of a call.
RETURNS, RAISES, EITHER = "returns", "raises", "returns or raises"

INTEGERS = [0, -1, 1, 2, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1, -(2**31), -(2**63)]
FLOAT_VALUES = [float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 1e-42, -0.0, 3e4]
ID_VALUES = [-1, -2, -(2**31), 2**31 - 1, -(2**63), 2**63 - 1, 2**32, 10**6, 0, 1]
STRINGS = ["", "softmax", "silu ", "SILU", "x" * 5000, "probs\0", "ä", "hidden"]
DTYPE_NAMES = (
    "float64 float32 bfloat16 float16 int64 int32 int16 int8 uint8 bool complex64 complex128 "
    "complex32 float8_e4m3fn float8_e5m2 uint16 uint32 uint64"
)
ALL_DTYPES = [getattr(torch, name) for name in DTYPE_NAMES.split()]

# Operators whose output autograd can take further.
DIFFERENTIABLE = {
    *("_router_logits", "topk_router", "_router_weights", "load_balancing_loss", "router_z_loss"),
    *("permute", "unpermute", "_grouped_linear", "expert_ffn", "moe_ffn", "_moe_ffn_pairs"),
    "_pair_weights",
}
# Of those, the ones whose second derivatives are zero, at least by one input alone.
LINEAR = {
    *("permute", "load_balancing_loss", "_pair_weights", "unpermute", "_grouped_linear"),
    "_router_logits",
}


@dataclass
class Case:
    call: Call
    expected: str
    mode: str  # how it is called: see run_case

    def describe(self) -> str:
        arguments = ", ".join(
            f"{name}={describe(value)}" for name, value in self.call.arguments.items()
        )
        return f"{self.call.operator}({arguments}) [{self.mode}; {'; '.join(self.call.notes)}]"


def describe(value: Any) -> str:
    if not torch.is_tensor(value):
        return repr(value)[:60]
    if value.is_nested:
        return "nested"
    text = f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if value.layout != torch.strided or value.is_quantized:
        return f"{text} {value.layout}"
    if not value.is_contiguous():
        text += f" strides {value.stride()}"
    if value.is_meta:
        text += " meta"
    elif 0 < value.numel() <= 12 and value.dtype in (torch.int32, torch.int64):
        with contextlib.suppress(RuntimeError):
            text += f" = {value.tolist()}"
    return text + " grad" * value.requires_grad


# -- Mutations. Each takes the call, an argument's name and the random numbers; it changes the call
# -- and returns what is now expected, or None if it does not apply.


def tied(call: Call, letter: str, name: str) -> bool:
    """Whether a size of this argument is fixed by the other arguments."""
    variant = call.variant
    present = {
        other: s.sizes
        for other, s in variant.tensors.items()
        if other != name and call.arguments.get(other) is not None
    }
    letters = {x for sizes in present.values() for x in sizes}
    implied = {"E1": "E", "E": "E1", "W": "I", "I": "W"}
    return (
        letter in letters
        or letter in variant.uses
        or implied.get(letter) in letters
        or (letter == "TK" and {"T", "K"} <= letters)
        or (letter in "TK" and "TK" in letters)
    )


def is_tensor(call: Call, name: str) -> bool:
    return torch.is_tensor(call.arguments[name]) and name in call.variant.tensors


def all_used(call: Call) -> bool:
    return all(t.numel() > 0 for t in call.arguments.values() if torch.is_tensor(t))


def change_rank(call, name, rng):
    t = call.arguments[name]
    options = [t.unsqueeze(0), t.unsqueeze(-1), t.reshape(-1, 1, 1, 1)]
    if t.dim() > 0:
        options.append(t.flatten() if t.dim() > 1 else t.new_zeros(()))
    call.arguments[name] = rng.choice(options)
    return RAISES if call.arguments[name].dim() != t.dim() else None


def change_size(call, name, rng):
    t, s = call.arguments[name], call.variant.tensors[name]
    if t.dim() == 0:
        return None
    i = rng.randrange(t.dim())
    size = t.shape[i]
    new = rng.choice([n for n in (0, size - 1, size + 1, 2 * size + 1) if n >= 0 and n != size])
    shape = [*t.shape[:i], new, *t.shape[i + 1 :]]
    call.arguments[name] = call.draw.values("normal", shape).to(t.dtype)
    if t.dtype in (torch.int32, torch.int64):
        call.arguments[name] = torch.randint(
            -1, 3, shape, dtype=t.dtype, generator=call.draw.generator
        )
    product = s.sizes[i] in "TK" and new * t.numel() == 0 == size * t.numel()  # T K is what it was
    return RAISES if tied(call, s.sizes[i], name) and not product else EITHER


def change_dtype(call, name, rng):
    t = call.arguments[name]
    dtype = rng.choice(ALL_DTYPES)
    specs = [v.tensors[name] for v in OPERATORS[call.operator] if name in v.tensors]
    allowed = {dtype for each in specs for dtype in DTYPES.get(each.dtype, (t.dtype,))}
    others = [n for n, o in call.variant.tensors.items() if o.dtype == f"like {name}"]
    if dtype == t.dtype or (dtype in allowed and any(is_tensor(call, n) for n in others)):
        return None
    call.arguments[name] = t.to(dtype)
    return EITHER if dtype in allowed else RAISES


def huge(call, name, rng):
    """A size far beyond memory, at no cost: expanded, or beside a size of 0."""
    t = call.arguments[name]
    if t.dim() == 0:
        return None
    i = rng.randrange(t.dim())
    size = rng.choice([2**31 - 1, 2**31, 2**31 + 1, 2**40, 2**55])
    if rng.random() < 0.5:
        base = t.new_zeros([1 if n == 0 else n for n in t.shape]).select(i, 0).unsqueeze(i)
        shape = list(base.shape)
        shape[i] = size
        with contextlib.suppress(RuntimeError):
            call.arguments[name] = base.expand(shape)
            return EITHER
        return None
    shape = [0] * t.dim()
    shape[i] = size
    call.arguments[name] = t.new_empty(shape)
    return EITHER


def huge_together(call, name, rng):
    """One letter's size in all arguments far beyond memory."""
    sizes = call.variant.tensors[name].sizes
    letter = rng.choice(sizes) if sizes else None
    if letter not in call.draw.sizes or letter in ("E1", "W", "TK"):
        return None
    size = rng.choice([2**31 - 1, 2**31, 2**40, 2**55])
    zero = rng.choice([None, *(x for x in "TPHK" if x != letter)])
    for other, s in call.variant.tensors.items():
        t = call.arguments.get(other)
        if not torch.is_tensor(t) or t.dim() != len(s.sizes):
            continue
        shape = [
            {letter: size, zero: 0, "E1": size + 1 if letter == "E" else n}.get(x, n)
            for x, n in zip(s.sizes, t.shape, strict=True)
        ]
        with contextlib.suppress(RuntimeError):
            one = t.new_zeros([1] * t.dim()) if letter in s.sizes else t
            if all(a == b or b == 1 for a, b in zip(shape, one.shape, strict=True)):
                one = one.expand(shape)
            elif 0 in shape:
                one = t.new_empty(shape)
            call.arguments[other] = one
    return EITHER


def hostile_floats(call, name, rng):
    t = call.arguments[name]
    if not t.is_floating_point() or t.numel() == 0:
        return None
    t = t.clone()
    flat = t.view(-1)
    for _ in range(rng.choice([1, 3, t.numel()])):
        flat[rng.randrange(t.numel())] = rng.choice(FLOAT_VALUES)
    call.arguments[name] = t
    return EITHER if name in ("capacity_factor", "noise") else RETURNS


def hostile_ids(call, name, rng):
    t = call.arguments[name]
    if t.dtype not in (torch.int32, torch.int64) or t.numel() == 0:
        return None
    t = t.clone()
    flat = t.view(-1)
    choice = rng.choice(["one", "few", "shuffle", "repeat", "constant", "sorted"])
    limit = torch.iinfo(t.dtype)
    values = [v for v in [*ID_VALUES, t.numel(), t.numel() - 1] if limit.min <= v <= limit.max]
    if choice in ("one", "few"):
        for _ in range(1 if choice == "one" else 4):
            flat[rng.randrange(t.numel())] = rng.choice(values)
    elif choice == "shuffle":
        flat.copy_(flat[torch.randperm(t.numel(), generator=call.draw.generator)].clone())
    elif choice == "repeat":
        flat.copy_(flat[rng.randrange(t.numel())].clone())
    elif choice == "constant":
        flat.fill_(rng.choice(values))
    else:
        flat.copy_(flat.sort(descending=rng.random() < 0.5).values)
    call.arguments[name] = t
    return expected_of_ids(call, name, flat.tolist())


def expected_of_ids(call: Call, name: str, values: list[int]) -> str:
    """By the contract of ids (>= -1), row maps (rows once, or -1) and offsets (ascending)."""
    kind = call.variant.tensors[name].values
    if kind == "ids":
        if min(values) >= -1:
            return RETURNS
        names = ("permute", "moe_ffn", "load_balancing_loss", "_moe_ffn_forward", "_moe_ffn_packed")
        public = call.operator in names
        # Nobody looks at the ids of masked tokens, nor at any where the shares are given.
        looks = all(call.arguments.get(key) is None for key in ("expert_share", "token_mask"))
        return RAISES if public and looks else EITHER
    if kind == "row_map" and call.operator in ("unpermute", "_unpermute_backward"):
        rows = [v for v in values if v != -1]
        N = call.draw.sizes["N"]
        good = len(set(rows)) == len(rows) and all(0 <= v < N for v in rows)
        return RETURNS if good else RAISES
    if kind == "row_map" and call.operator == "_permute_backward":
        N = len(values)
        return EITHER if all(-1 <= v < N for v in values) else RAISES
    if kind == "row_offsets":
        N = call.draw.sizes["N"]
        good = values[0] == 0 and values == sorted(values) and values[-1] <= N
        return RETURNS if good else RAISES
    if kind == "pair_tokens":
        return EITHER if all(-1 <= v < call.draw.sizes["T"] for v in values) else RAISES
    return EITHER


def move(call, name, rng):
    """One argument of several on the meta device."""
    others = [n for n in call.arguments if n != name and is_tensor(call, n)]
    if not others:
        return None
    call.arguments[name] = call.arguments[name].to("meta")
    return RAISES


def free(call, name, rng):
    """A tensor whose storage was freed, as FSDP frees parameters."""
    t = call.arguments[name].clone()
    if t.numel() == 0:
        return None
    t.untyped_storage().resize_(0)
    call.arguments[name] = t
    return RAISES if all_used(call) and must_read(call, name) else EITHER


def must_read(call: Call, name: str) -> bool:
    """Whether a call with no empty argument reads this one."""
    a = call.arguments
    if "output_mask" in a or a.get("token_mask") is not None:
        return False
    if name == "topk_ids":
        return a.get("expert_share") is None and call.operator != "_load_balancing_loss_backward"
    return name in ("rows", "tokens", "row_map", "expert_offsets", "router_logits", "router_probs")


def shrink(call, name, rng):
    """A tensor that reaches past the end of its storage."""
    t = call.arguments[name].clone()
    if t.numel() < 2:
        return None
    t.untyped_storage().resize_(t.element_size() * (t.numel() // 2))
    call.arguments[name] = t
    return EITHER


def change_layout(call, name, rng):
    t = call.arguments[name]
    kind = rng.choice(["sparse", "csr", "quantised", "nested", "mkldnn"])
    call.arguments[name] = {
        "sparse": lambda: t.to_sparse(),
        "csr": lambda: t.to_sparse_csr(),
        "quantised": lambda: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
        "nested": lambda: torch.nested.nested_tensor([t]),
        "mkldnn": lambda: t.float().to_mkldnn(),
    }[kind]()
    return RAISES


def stride(call, name, rng):
    """The same values at strides of 0, overlapping, conjugated or negated lazily."""
    t = call.arguments[name]
    if t.numel() == 0 or t.dim() == 0:
        return None
    if t.is_floating_point() and rng.random() < 0.3:
        call.arguments[name] = torch._neg_view(t)
        return RETURNS
    if not t.is_floating_point():
        return None
    i = rng.randrange(t.dim())
    call.arguments[name] = t.select(i, 0).unsqueeze(i).expand(t.shape)
    return RETURNS


def not_a_tensor(call, name, rng):
    call.arguments[name] = rng.choice([None, 3, 2.5, "x", [1.0, 2.0], (), torch.float32, object()])
    # torch takes a number for a tensor.
    numbers = isinstance(call.arguments[name], int | float)
    optional = call.variant.tensors[name].optional
    return EITHER if numbers or (optional and call.arguments[name] is None) else RAISES


def alias(call, name, rng):
    """The same storage under two arguments."""
    t = call.arguments[name]
    for other in call.arguments:
        o = call.arguments[other]
        if other != name and is_tensor(call, other) and o.dtype == t.dtype and o.shape == t.shape:
            call.arguments[other] = t
            return EITHER
    return None


TENSOR_MUTATIONS: list[Callable] = [
    *(change_rank, change_size, change_size, change_dtype, change_dtype, huge, huge_together),
    *(hostile_floats, hostile_ids, hostile_ids, hostile_ids, move, free, shrink, change_layout),
    *(stride, not_a_tensor, alias),
]


def change_other(call: Call, name: str, rng: random.Random) -> str | None:
    """An argument that is no tensor."""
    value = call.arguments[name]
    if name == "output_mask":
        n = len(value)
        value = rng.choice([[False] * n, [True] * n, [True] * (n + 1), [], None, "x", [0.5] * n])
        call.arguments[name] = value
        good = isinstance(value, list) and len(value) == n and all(v in (0, 1) for v in value)
        if good and not call.notes:
            call.outputs = call.variant.outputs(call.draw, call.arguments)
        return RETURNS if good else EITHER if value in ([0.5] * n,) else RAISES
    if isinstance(value, str):
        call.arguments[name] = rng.choice([*STRINGS, None, 3])
        return EITHER if call.arguments[name] in ("softmax", "hidden") else RAISES
    if isinstance(value, bool):
        call.arguments[name] = rng.choice([not value, None, "yes", 2.5, 7])
        return RAISES if isinstance(call.arguments[name], str) else EITHER  # torch converts
    if isinstance(value, float):
        call.arguments[name] = rng.choice([*FLOAT_VALUES, 1e308, 0, None, "1", 2**62])
        good = isinstance(call.arguments[name], int | float)
        return RETURNS if good else RAISES
    call.arguments[name] = new = rng.choice(
        [*INTEGERS, value + 1, value - 1, 1.5, None, "2", 2**70]
    )
    if not isinstance(new, int) or new >= 2**63:
        return RAISES
    return expected_of_integer(call, name, new)


def expected_of_integer(call: Call, name: str, value: int) -> str:
    a, T = call.arguments, call.draw.sizes["T"]
    if name == "min_capacity" and a.get("capacity_factor") is None:
        return RETURNS
    if value < 1:
        return RAISES
    if name == "top_k" and value > call.draw.sizes["E"]:
        return RAISES
    if name == "num_sequences" and (T % value or (value > 1 and a["expert_share"] is not None)):
        return RAISES
    if name == "num_experts" and "E" in call.variant.uses and value != call.draw.sizes["E"]:
        return RAISES
    return EITHER


def make_case(rng: random.Random, without: frozenset[str] = frozenset()) -> Case:
    """`without`: names of mutations to leave out."""
    operator = rng.choice(sorted(OPERATORS))
    call = good_call(operator, rng)
    expected = RETURNS
    for name in rng.sample(list(call.arguments), rng.choice([0, 1, 1, 1, 1, 2])):
        if is_tensor(call, name):
            mutation = rng.choice(TENSOR_MUTATIONS)
            if call.arguments[name].numel() > 1 << 20:
                continue  # huge already: copies would not fit
            if mutation.__name__ in without:
                continue
            if operator == "_add_once" and mutation is not hostile_floats:
                continue  # its body is torch's add_
            if name in WRITES.get(operator, ()) and mutation is not hostile_floats:
                continue
            before = dict(call.arguments)
            try:
                outcome = mutation(call, name, rng)
            except ERRORS:  # torch has no such tensor
                outcome = None
            if outcome is None:
                call.arguments = before
                continue
            call.notes.append(f"{mutation.__name__}({name})")
        elif name in call.variant.tensors or call.arguments[name] is None:
            continue
        else:
            outcome = change_other(call, name, rng)
            if outcome is None:
                continue
            call.notes.append(f"{name}={call.arguments[name]!r:.40}")
        if len(call.notes) > 1:  # together they may mean something else
            outcome = EITHER
        expected = outcome
    if not call.notes:
        fixed = WRITES.get(operator, ())
        for name in (n for n in call.arguments if is_tensor(call, n) and n not in fixed):
            call.arguments[name], how = lay_out(call.arguments[name], rng)
            if how != "dense":
                call.notes.append(f"{name} {how}")
    mode = rng.choice(["plain"] * 4 + ["grad"] * 3 + ["no_grad", "inference", "meta", "autocast"])
    if mode == "meta" and any(torch.is_tensor(t) and t.is_meta for t in call.arguments.values()):
        mode = "plain"
    if mode in ("autocast", "meta") and expected == RAISES:
        expected = EITHER  # casting mends dtypes; a meta tensor has no values
    if mode in ("autocast", "grad") and call.operator == "_moe_ffn_packed" and expected == RETURNS:
        expected = EITHER  # has no backward, and weights that can't be cast
    return Case(call, expected, mode)


# -- Running and judging.


def storages(call: Call) -> dict[str, Tensor]:
    """The bytes of every argument's storage."""
    result = {}
    for name, t in call.arguments.items():
        with contextlib.suppress(RuntimeError, NotImplementedError):
            if torch.is_tensor(t) and t.device.type == "cpu" and t.layout == torch.strided:
                storage = t.untyped_storage()
                whole = torch.empty(0, dtype=torch.uint8).set_(storage)
                result[name] = whole.clone()
    return result


def written(call: Call, before: dict[str, Tensor]) -> list[str]:
    """Arguments that are not what they were."""
    allowed = WRITES.get(call.operator, set())
    after = storages(call)
    return [n for n, b in before.items() if n not in allowed and not torch.equal(after[n], b)]


def names_operator(message: str, operator: str) -> bool:
    stem = operator.strip("_").removesuffix("_into")
    stem = stem.removesuffix("_forward").removesuffix("_backward")
    stems = {stem, "moe_ffn" if stem in ("moe_ffn_pairs", "expert_ffn") else stem}
    return any(s in message for s in stems) or TORCHS_OWN.search(message) is not None


def wrong_outputs(call: Call, outputs: tuple, device: str) -> list[str]:
    """What is not as the operator's table says."""
    if len(outputs) != len(call.outputs):
        return [f"{len(outputs)} outputs, expected {len(call.outputs)}"]
    problems = []
    inputs = {
        t.untyped_storage().data_ptr()
        for t in call.arguments.values()
        if torch.is_tensor(t) and t.layout == torch.strided and t.device.type == "cpu"
    }
    for i, (got, want) in enumerate(zip(outputs, call.outputs, strict=True)):
        if want is None or got is None:
            # An output that was not asked for may be absent or empty.
            if want is not None or (got is not None and got.numel() > 0):
                problems.append(f"output {i} is {describe(got)}, expected {want}")
            continue
        if (got.dtype, list(got.shape), got.device.type) != (*want, device):
            problems.append(f"output {i} is {describe(got)} on {got.device}, expected {want}")
        if device == "cpu" and got.numel() and got.untyped_storage().data_ptr() in inputs:
            problems.append(f"output {i} shares an input's storage")
    return problems


def as_tuple(outputs: Any) -> tuple:
    return outputs if isinstance(outputs, tuple) else () if outputs is None else (outputs,)


def bits(tensor: Tensor) -> Tensor:
    """The same memory as integers, so that NaN equals itself."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().view(integers[tensor.element_size()])


def differing_bits(call: Call, first: tuple, second: tuple) -> list[str]:
    """Outputs that are not the same on fresh memory of another content."""
    result = []
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        hidden = (
            call.operator.endswith("ffn_forward") and i == 1
        )  # rows past the last are undefined
        if a is None or hidden:
            continue
        if not torch.equal(bits(a), bits(b)):
            result.append(f"output {i} differs from run to run")
    return result


@contextlib.contextmanager
def filled_memory():
    """Fresh memory holds NaN or the largest integer."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def backward(call: Call, outputs: tuple, rng: random.Random) -> list[str]:
    """Backward with any gradients; the gradients have their inputs' dtypes and shapes."""
    chosen = [o for o in outputs if o is not None and o.requires_grad and rng.random() < 0.8]
    if not chosen:
        return []
    grads = []
    for o in chosen:
        grad = torch.randn(o.shape, generator=call.draw.generator, dtype=torch.float64).to(o.dtype)
        kind = rng.choice(["dense", "expanded", "nan", "transposed"])
        if kind == "expanded":
            grad = torch.ones((), dtype=o.dtype).expand(o.shape)
        elif kind == "nan" and grad.numel():
            grad.view(-1)[0] = torch.nan
        elif kind == "transposed":
            grad = grad.transpose(0, -1).contiguous().transpose(0, -1) if grad.dim() else grad
        grads.append(grad)
    leaves = {n: t for n, t in call.arguments.items() if torch.is_tensor(t) and t.requires_grad}
    twice = call.operator not in LINEAR and rng.random() < 0.2
    results = torch.autograd.grad(
        chosen, list(leaves.values()), grads, allow_unused=True, create_graph=twice
    )
    problems = silent_second_derivatives(results, leaves) if twice else []
    return problems + [
        f"the gradient of {name} is {describe(grad)}"
        for (name, leaf), grad in zip(leaves.items(), results, strict=True)
        if grad is not None and (grad.dtype, grad.shape) != (leaf.dtype, leaf.shape)
    ]


def silent_second_derivatives(grads: tuple, leaves: dict[str, Tensor]) -> list[str]:
    """Gradients that were asked for with a graph: whoever goes on gets an error, not a zero."""
    again = [grad for grad in grads if grad is not None and grad.requires_grad and grad.numel()]
    if not again:
        return [] if all(g is None or not g.numel() for g in grads) else ["gradients have no graph"]
    ones = [torch.ones_like(grad) for grad in again]
    try:
        second = torch.autograd.grad(again, list(leaves.values()), ones, allow_unused=True)
    except RuntimeError as error:
        return [] if "derivative" in str(error) else [f"second derivatives: {first_line(error)}"]
    vanished = all(s is None for s in second)
    return ["second derivatives vanish silently"] if vanished else []


def run_case(case: Case, rng: random.Random) -> tuple[str, list[str]]:
    """What came of the call ("returned" or an error's name), and what was wrong with it."""
    call, mode = case.call, case.mode
    function = getattr(torch.ops.moe_ext, call.operator)
    if mode == "meta":
        for name, t in call.arguments.items():
            if torch.is_tensor(t):
                with contextlib.suppress(RuntimeError, NotImplementedError):
                    call.arguments[name] = t.to("meta")
    if mode == "grad" and call.operator not in WRITES:
        for t in call.arguments.values():
            if torch.is_tensor(t) and t.is_floating_point() and rng.random() < 0.6:
                with contextlib.suppress(RuntimeError):
                    t.requires_grad_()
    context = {
        "no_grad": torch.no_grad,
        "inference": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    }.get(mode, contextlib.nullcontext)
    before = storages(call)
    problems = []
    try:
        with context():
            outputs = as_tuple(function(**call.arguments))
        outcome = "returned"
        device = "meta" if mode == "meta" else "cpu"
        as_documented = case.expected == RETURNS and mode != "autocast"
        if as_documented:
            problems += wrong_outputs(call, outputs, device)
        if mode == "grad" and call.operator in DIFFERENTIABLE:
            problems += backward(call, outputs, rng)
        if mode in ("plain", "no_grad") and as_documented and call.operator not in WRITES:
            with filled_memory(), context():
                again = as_tuple(function(**call.arguments))
            problems += differing_bits(call, outputs, again)
        if case.expected == RAISES:
            problems.append("returned, but the contract asks for an error")
    except ERRORS as error:
        outcome = type(error).__name__
        if case.expected == RETURNS:
            problems.append(f"raised for a good call: {outcome}: {first_line(error)}")
        elif not names_operator(str(error), call.operator):
            copied = "Storage size calculation overflowed" in str(error) and "huge" in str(
                call.notes
            )
            if not copied:  # torch's, of a copy of an argument
                problems.append(f"the message names no operator: {outcome}: {first_line(error)}")
    except Exception as error:  # not an error that callers expect
        outcome = type(error).__name__
        problems.append(f"raised a {outcome}: {first_line(error)}")
    changed = written(call, before)
    if changed:
        problems.append(f"wrote into {', '.join(changed)}")
    return outcome, problems


def first_line(error: Exception) -> str:
    return (str(error) or "(no message)").split("\n")[0][:300]


def missing_operators() -> set[str]:
    """Registered operators without a table, and tables without an operator."""
    return set(schemas()) ^ set(OPERATORS)
