"""What the operators mean, written from their definitions as loops in float64.

Nothing here comes from `moe_ext.reference`: two oracles that share a mistake are one. Tensors are
float64 and autograd gives their gradients; ids, offsets and maps are lists of ints.
"""

import math
from fractions import Fraction

import torch
from torch import Tensor


def used(e: int, E: int) -> bool:
    return 0 <= e < E


def stack(rows: list[Tensor], width: int) -> Tensor:
    return torch.stack(rows) if rows else torch.zeros(0, width, dtype=torch.float64)


# -- The router.


def router_logits(tokens: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("th,eh->te", tokens, weight)


def scores(z: Tensor, score_function: str) -> Tensor:
    """Of one token: what experts are ranked by, beside a bias."""
    if score_function == "sigmoid":
        return 1 / (1 + torch.exp(-z))
    y = torch.exp(z - z.max())
    return y / y.sum()


def choice(
    z: list[float],
    K: int,
    score_function: str,
    bias: list[float] | None,
    num_groups: int,
    topk_groups: int,
) -> tuple[list[int], bool]:
    """The ids of one token's experts, and whether rounding cannot have changed them."""
    E = len(z)
    if bias is None and num_groups == 1:
        return sorted(range(E), key=lambda e: (-z[e], e))[:K], True
    y = scores(torch.tensor(z, dtype=torch.float64), score_function).tolist()
    keys = [y[e] + (bias[e] if bias else 0) for e in range(E)]
    same = [(z[e], bias[e] if bias else 0) for e in range(E)]  # equal ones tie in any rounding
    size = E // num_groups
    groups = [range(g * size, (g + 1) * size) for g in range(num_groups)]
    best = 2 if score_function == "sigmoid" else 1
    totals = [sum(sorted((keys[e] for e in g), reverse=True)[:best]) for g in groups]
    ranked = sorted(range(num_groups), key=lambda g: (-totals[g], g))
    candidates = sorted(
        (e for g in ranked[:topk_groups] for e in groups[g]), key=lambda e: (-keys[e], e)
    )

    def close(a: float, b: float) -> bool:
        return abs(a - b) < 1e-5 * max(1, abs(a))

    safe = topk_groups == num_groups or not close(
        totals[ranked[topk_groups - 1]], totals[ranked[topk_groups]]
    )
    for a, b in zip(candidates[:K], candidates[1 : K + 1], strict=False):
        safe = safe and (same[a] == same[b] or not close(keys[a], keys[b]))
    return candidates[:K], safe


def router_weights(
    logits: Tensor,
    ids: list[list[int]],
    K: int,
    score_function: str,
    renormalize: bool,
    scaling_factor: float,
) -> tuple[Tensor, Tensor]:
    E, weights, probs = logits.shape[1], [], []
    for z, row in zip(logits, ids, strict=True):
        y = scores(z, score_function)
        probs.append(y / y.sum())
        valid = [e for e in row if used(e, E)]
        if renormalize and valid:
            if score_function == "softmax":  # over the chosen logits: they may all underflow
                top = max(z[e] for e in valid).detach()
                y = torch.exp(z - top)
                total = sum(y[e] for e in valid)
            else:
                total = sum(y[e] for e in valid) + 1e-20
            y = y / total
        weights.append(
            torch.stack([y[e] * scaling_factor if used(e, E) else y.sum() * 0 for e in row])
        )
    return stack(weights, K), stack(probs, E)


# -- The balance losses.


def load_balancing_loss(
    probs: Tensor,
    ids: list[list[int]],
    mask: list[bool] | None,
    normalize_by_topk: bool,
    num_sequences: int,
    expert_share: Tensor | None,
) -> Tensor:
    T, E = probs.shape
    length, losses = T // num_sequences, []
    for s in range(num_sequences):
        tokens = [t for t in range(s * length, (s + 1) * length) if mask is None or mask[t]]
        if not tokens:
            continue
        K, loss = len(ids[tokens[0]]), 0
        for e in range(E):
            count = sum(ids[t].count(e) for t in tokens)
            f = count / (len(tokens) * K) if expert_share is None else expert_share[e]
            loss = loss + E * f * sum(probs[t, e] for t in tokens) / len(tokens)
        losses.append(loss if normalize_by_topk else K * loss)
    return sum(losses) / len(losses) if losses else probs.sum() * 0


def mean_over(rows: Tensor, mask: list[bool] | None, value) -> Tensor:
    values = [value(row) for t, row in enumerate(rows) if mask is None or mask[t]]
    return sum(values) / len(values) if values else rows.sum() * 0


def router_z_loss(logits: Tensor, mask: list[bool] | None) -> Tensor:
    def value(z: Tensor) -> Tensor:
        return (z.max() + torch.log(torch.exp(z - z.max()).sum())) ** 2

    return mean_over(logits, mask, value)


def router_entropy(probs: Tensor, mask: list[bool] | None) -> Tensor:
    return mean_over(probs, mask, lambda p: -sum(x * torch.log(x) for x in p if x > 0))


def tokens_per_expert(ids: list[list[int]], E: int) -> list[int]:
    return [sum(row.count(e) for row in ids) for e in range(E)]


# -- Capacity, rounding and lists of pairs.


def slots_of(ids: list[list[int]], e: int) -> list[tuple[int, int]]:
    return [(t, k) for t, row in enumerate(ids) for k, id in enumerate(row) if id == e]


def capacity(factor: float, ids: list[list[int]], E: int, least: int) -> int:
    choices = sum(used(e, E) for row in ids for e in row)
    tokens = sum(any(used(e, E) for e in row) for row in ids)
    return min(max(math.ceil(Fraction(factor) * choices / E), least), tokens)


def apply_capacity(
    weights: list[list[float]], ids: list[list[int]], factor: float, E: int, least: int, policy: str
) -> list[list[int]]:
    limit = capacity(factor, ids, E, least)
    kept = [[-1] * len(row) for row in ids]
    for e in range(E):
        rank = {
            "probs": lambda s: (-weights[s[0]][s[1]], s),
            "position": lambda s: (s[1], s[0]),
        }[policy]
        for t, k in sorted(slots_of(ids, e), key=rank)[:limit]:
            kept[t][k] = e
    return kept


def rounded_counts(f: list[int], M: int, most: int, rounding: str, noise) -> list[int]:
    """The multiple of M for every expert's count, none above `most`."""
    limit = M * (most // M)
    down, rest = [M * (n // M) for n in f], [n % M for n in f]
    if rounding == "balanced":
        ups, left = divmod(sum(rest), M)
        ups += 2 * left > M
        able = [e for e in range(len(f)) if rest[e] and down[e] + M <= limit]
        raised = set(sorted(able, key=lambda e: (-rest[e], e))[:ups])
    else:
        raised = {
            e
            for e in range(len(f))
            if (rounding == "nearest" and 2 * rest[e] > M)
            or (rounding == "up" and rest[e] > 0)
            or (rounding == "stochastic" and Fraction(noise[e]) * M < rest[e])
        }
    return [min(down[e] + M * (e in raised), limit) for e in range(len(f))]


def round_tokens(
    probs: list[list[float]],
    weights: list[list[float]],
    ids: list[list[int]],
    E: int,
    M: int,
    rounding: str,
    factor: float | None,
    least: int,
    noise: list[float] | None,
) -> tuple[list[tuple[int, int, int]], list[list[int]]]:
    """(token, expert, slot) of every pair, slot -1 for a padded one; the ids that are kept."""
    K = len(ids[0]) if ids else 0
    routed = [t for t, row in enumerate(ids) if any(used(e, E) for e in row)]
    most = len(routed) if factor is None else capacity(factor, ids, E, least)
    counts = rounded_counts(tokens_per_expert(ids, E), M, most, rounding, noise)
    pairs, kept = [], [[-1] * K for _ in ids]
    for e in range(E):
        chosen = dict(slots_of(ids, e))

        def rank(t: int, e: int = e, chosen: dict = chosen) -> tuple:
            score = weights[t][chosen[t]] if t in chosen else probs[t][e]
            return (t not in chosen, -score, t)

        for t in sorted(sorted(routed, key=rank)[: counts[e]]):
            pairs.append((t, e, t * K + chosen[t] if t in chosen else -1))
            if t in chosen:
                kept[t][chosen[t]] = e
    return pairs, kept


def expert_choice(probs: list[list[float]], mask, E: int, K: int) -> list[tuple[int, int]]:
    tokens = [t for t in range(len(probs)) if mask is None or mask[t]]
    count = min(len(tokens), math.ceil(Fraction(len(tokens) * K, E)))
    return [
        (t, e)
        for e in range(E)
        for t in sorted(sorted(tokens, key=lambda t: (-probs[t][e], t))[:count])
    ]


def pair_weights(
    weights: Tensor, probs: Tensor, tokens, experts, slots, scaling_factor: float
) -> Tensor:
    zero = probs.sum() * 0 + weights.sum() * 0
    out = []
    for p, (t, e) in enumerate(zip(tokens, experts, strict=True)):
        if t < 0:
            out.append(zero)
        elif slots is not None and slots[p] >= 0:
            out.append(weights.reshape(-1)[slots[p]] + zero)
        else:
            out.append(scaling_factor * probs[t, e] + zero)
    return torch.stack(out) if out else zero.expand(0)


# -- Rows and experts.


def permute(tokens: Tensor, ids: list[list[int]], E: int) -> tuple[Tensor, list, list[int]]:
    row_map, offsets, rows = [[-1] * len(row) for row in ids], [0], []
    for e in range(E):
        for t, k in slots_of(ids, e):
            row_map[t][k] = len(rows)
            rows.append(tokens[t])
        offsets.append(len(rows))
    skipped = sum(len(row) for row in ids) - len(rows)
    rows += [tokens.sum() * 0 * torch.ones(tokens.shape[1], dtype=torch.float64)] * skipped
    return stack(rows, tokens.shape[1]), row_map, offsets


def unpermute(rows: Tensor, row_map: list[list[int]], weights: Tensor | None) -> Tensor:
    out = []
    for t, slots in enumerate(row_map):
        total = torch.zeros(rows.shape[1], dtype=torch.float64) + rows.sum() * 0
        for k, r in enumerate(slots):
            if r >= 0:
                total = total + (rows[r] if weights is None else weights[t, k] * rows[r])
        out.append(total)
    return stack(out, rows.shape[1])


def expert_of_rows(offsets: list[int], N: int) -> list[int]:
    """-1 at and past the last offset."""
    experts = [-1] * N
    for e in range(len(offsets) - 1):
        for r in range(offsets[e], offsets[e + 1]):
            experts[r] = e
    return experts


def grouped_linear(rows: Tensor, offsets: list[int], weight: Tensor, bias: Tensor | None) -> Tensor:
    out = []
    for r, e in enumerate(expert_of_rows(offsets, rows.shape[0])):
        if e < 0:
            out.append(torch.zeros(weight.shape[1], dtype=torch.float64))
        else:
            out.append(weight[e] @ rows[r] + (bias[e] if bias is not None else 0))
    return stack(out, weight.shape[1])


def activate(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    """act(gate) up, or act(gate) where there is no up."""
    if activation == "swiglu_clamped":
        gate, up = gate.clamp(max=7), up.clamp(-7, 7)
        return gate / (1 + torch.exp(-1.702 * gate)) * (up + 1)
    cubic = gate + 0.044715 * gate**3
    y = {
        "silu": lambda: gate / (1 + torch.exp(-gate)),
        "gelu": lambda: 0.5 * gate * (1 + torch.erf(gate / math.sqrt(2))),
        "gelu_tanh": lambda: 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * cubic)),
        "relu": lambda: torch.where(gate > 0, gate, 0 * gate),
        "relu2": lambda: torch.where(gate > 0, gate, 0 * gate) ** 2,
        "identity": lambda: gate,
    }[activation]()
    return y if up is None else y * up


class Experts:
    """The experts' weights, and how near their pre-activations came to a kink."""

    def __init__(self, gate_up, down, gate_up_bias, down_bias, activation: str, gated: bool):
        self.gate_up, self.down = gate_up, down
        self.gate_up_bias, self.down_bias = gate_up_bias, down_bias
        self.activation, self.gated = activation, gated
        self.nearest_kink = math.inf

    def __call__(self, x: Tensor, e: int) -> Tensor:
        hidden = self.gate_up[e] @ x
        if self.gate_up_bias is not None:
            hidden = hidden + self.gate_up_bias[e]
        I = self.down.shape[2]
        gate, up = (hidden[:I], hidden[I:]) if self.gated else (hidden, None)
        if self.activation == "relu":
            self.near(gate)
        if self.activation == "swiglu_clamped":
            self.near(torch.stack([gate - 7, up - 7, up + 7]))
        out = self.down[e] @ activate(gate, up, self.activation)
        return out if self.down_bias is None else out + self.down_bias[e]

    def near(self, distance: Tensor) -> None:
        self.nearest_kink = min(self.nearest_kink, distance.detach().abs().min().item())


def expert_ffn(
    rows: Tensor, offsets: list[int], experts: Experts, weights: Tensor | None
) -> Tensor:
    out = []
    for r, e in enumerate(expert_of_rows(offsets, rows.shape[0])):
        if e < 0:
            out.append(torch.zeros(rows.shape[1], dtype=torch.float64))
        else:
            y = experts(rows[r], e)
            out.append(y if weights is None else weights[r] * y)
    return stack(out, rows.shape[1])


def moe_ffn(tokens: Tensor, pairs: list[tuple[int, int, Tensor]], experts: Experts) -> Tensor:
    """pairs: (token, expert, weight) of what is used."""
    out = [torch.zeros(tokens.shape[1], dtype=torch.float64) for _ in range(tokens.shape[0])]
    for t, e, weight in pairs:
        out[t] = out[t] + weight * experts(tokens[t], e)
    return stack(out, tokens.shape[1])
