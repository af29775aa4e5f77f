"""The model of spec §2-4 in plain torch: one sequence and one token at a time, nothing shared
with the package but the names of the weights. It exists to disagree with the package."""

import math
from dataclasses import dataclass, field

import torch

from dsv3_jax.config import ModelConfig

Weights = dict[str, torch.Tensor]  # dotted path -> tensor; kernels are [in, out]


@dataclass
class LayerStats:
    """Load of one MoE layer over a batch, and its balance losses averaged over sequences."""

    counts: torch.Tensor  # [E] tokens routed to each expert
    sequence_loss: torch.Tensor
    expert_loss: torch.Tensor
    device_loss: torch.Tensor
    communication_loss: torch.Tensor


@dataclass
class Output:
    """Of one batch. `logits` [B, T, V]; `mtp_logits[k-1]` [B, T-k, V]."""

    logits: torch.Tensor
    mtp_logits: list[torch.Tensor]
    stats: list[LayerStats]  # main MoE layers, then MTP modules
    margins: list[float] = field(default_factory=list)  # of every top-k decision taken


def under(weights: Weights, prefix: str) -> Weights:
    return {p[len(prefix) :]: w for p, w in weights.items() if p.startswith(prefix)}


def layer(weights: Weights, group: str, index: int) -> Weights:
    return {path: stacked[index] for path, stacked in under(weights, f"{group}.").items()}


def rms_norm(x: torch.Tensor, gain: torch.Tensor, epsilon: float) -> torch.Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + epsilon) * gain


def rope_frequencies(model: ModelConfig) -> list[float]:
    """theta_p of every adjacent pair, interpolated by YaRN when it is on (spec §2)."""
    R, base, yarn = model.qk_rope_head_dim, model.rope_theta, model.yarn
    plain = [base ** (-2 * p / R) for p in range(R // 2)]
    if not yarn.enabled:
        return plain

    def dim(rotations: float) -> float:
        turn = yarn.original_length / (2 * math.pi * rotations)
        return R * math.log(turn) / (2 * math.log(base))

    low = max(math.floor(dim(yarn.beta_fast)), 0)
    high = min(math.ceil(dim(yarn.beta_slow)), R - 1)
    span = (high - low) or 0.001
    ramps = [min(max((p - low) / span, 0.0), 1.0) for p in range(R // 2)]
    return [t * (1 - r) + t / yarn.factor * r for t, r in zip(plain, ramps, strict=True)]


def rotate(x_R: torch.Tensor, position: int, frequencies: list[float]) -> torch.Tensor:
    """Rotates each adjacent pair of the last dim as a complex number."""
    out = []
    for p, theta in enumerate(frequencies):
        cos, sin = math.cos(position * theta), math.sin(position * theta)
        even, odd = x_R[..., 2 * p], x_R[..., 2 * p + 1]
        out += [even * cos - odd * sin, even * sin + odd * cos]
    return torch.stack(out, dim=-1)


def attention(w: Weights, x_TD: torch.Tensor, model: ModelConfig) -> torch.Tensor:
    """MLA in its naive form (spec §2)."""
    T, N, L = x_TD.shape[0], model.num_heads, model.kv_latent_dim
    P, H = model.qk_nope_head_dim, model.v_head_dim
    frequencies = rope_frequencies(model)
    if model.q_latent_dim is None:
        q = x_TD @ w["wq.kernel"]
    else:
        latent = rms_norm(x_TD @ w["wq_a.kernel"], w["q_norm.gain"], model.norm_epsilon)
        q = latent @ w["wq_b.kernel"]
    q_TNh = q.reshape(T, N, model.qk_head_dim)
    down = x_TD @ w["wkv_a.kernel"]
    latent_TL = rms_norm(down[:, :L], w["kv_norm.gain"], model.norm_epsilon)
    kv_TNh = (latent_TL @ w["wkv_b.kernel"]).reshape(T, N, P + H)
    scale = model.qk_head_dim**-0.5
    if model.yarn.enabled:
        scale *= (0.1 * model.yarn.mscale * math.log(model.yarn.factor) + 1) ** 2
    rope_keys = [rotate(down[j, L:], j, frequencies) for j in range(T)]
    rows = []
    for t in range(T):
        heads = []
        for n in range(N):
            rope_query = rotate(q_TNh[t, n, P:], t, frequencies)
            scores = torch.stack(
                [
                    scale * (q_TNh[t, n, :P] @ kv_TNh[j, n, :P] + rope_query @ rope_keys[j])
                    for j in range(t + 1)
                ]
            )
            heads.append(torch.softmax(scores, dim=0) @ kv_TNh[: t + 1, n, P:])
        rows.append(torch.cat(heads))
    return torch.stack(rows) @ w["wo.kernel"]


def gated_ffn(w13: torch.Tensor, w2: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    gate, up = (x @ w13).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up) @ w2


def best(values: list[float], count: int, margins: list[float]) -> set[int]:
    """Positions of the largest values; notes by how much the last one won."""
    order = sorted(range(len(values)), key=lambda i: -values[i])
    if count < len(values) and math.isfinite(values[order[count]]):
        margins.append(values[order[count - 1]] - values[order[count]])
    return set(order[:count])


def choose(
    scores: list[float], biases: list[float], model: ModelConfig, margins: list[float]
) -> set[int]:
    """The experts of one token: biased, limited to the best groups (spec §3, steps 2-4)."""
    E, G = model.num_experts, model.num_groups
    biased = [s + b for s, b in zip(scores, biases, strict=True)]
    if G > 1:
        members = [range(g * E // G, (g + 1) * E // G) for g in range(G)]
        taken = 2 if model.group_score == "top2_sum" else 1
        group_scores = [sum(sorted((biased[i] for i in m), reverse=True)[:taken]) for m in members]
        kept = best(group_scores, model.num_groups_kept, margins)
        for g in set(range(G)) - kept:
            for i in members[g]:
                biased[i] = -math.inf
    return best(biased, model.experts_per_token, margins)


def moe(
    w: Weights, u_TD: torch.Tensor, model: ModelConfig, valid: int, margins: list[float]
) -> tuple[torch.Tensor, LayerStats]:
    """DeepSeekMoE layer (spec §3); statistics over the first `valid` tokens of the sequence."""
    E, K, G = model.num_experts, model.experts_per_token, model.num_groups
    logits_TE = u_TD @ w["router.kernel"]
    sigmoid = model.affinity == "sigmoid"
    scores_TE = torch.sigmoid(logits_TE) if sigmoid else torch.softmax(logits_TE, dim=-1)
    biases = w["router.bias"].tolist()
    counts, raw_counts, group_counts = torch.zeros(E), torch.zeros(E), torch.zeros(G)
    outputs = []
    for t, u in enumerate(u_TD):
        scores = scores_TE[t].tolist()
        chosen = choose(scores, biases, model, margins)
        norm = sum(scores_TE[t, i] for i in chosen) if model.normalize_weights else 1.0
        y = sum(
            model.routed_scaling_factor
            * scores_TE[t, i]
            / norm
            * gated_ffn(w["experts.w13"][i], w["experts.w2"][i], u)
            for i in chosen
        )
        if model.num_shared_experts:
            y = y + gated_ffn(w["shared.w13.kernel"], w["shared.w2.kernel"], u)
        outputs.append(y)
        if t < valid:
            counts[list(chosen)] += 1
            raw_counts[list(best(scores, K, margins))] += 1
            group_counts[list({i * G // E for i in chosen})] += 1
    s_TE = scores_TE[:valid]
    raw_load = E / (K * valid) * raw_counts.to(s_TE.dtype)
    share_E = (s_TE / s_TE.sum(-1, keepdim=True)).mean(0)
    load_E, mean_E = E / (K * valid) * counts.to(s_TE.dtype), s_TE.mean(0)
    device_share_G = mean_E.reshape(G, -1).sum(-1)
    sent_G = G / (model.num_groups_kept * valid) * group_counts.to(s_TE.dtype)
    stats = LayerStats(
        counts=counts,
        sequence_loss=(raw_load * share_E).sum(),
        expert_loss=(load_E * mean_E).sum(),
        device_loss=(load_E.reshape(G, -1).mean(-1) * device_share_G).sum(),
        communication_loss=(sent_G * device_share_G).sum(),
    )
    return torch.stack(outputs), stats


def block(
    w: Weights, x_TD: torch.Tensor, model: ModelConfig, valid: int, margins: list[float]
) -> tuple[torch.Tensor, LayerStats | None]:
    epsilon = model.norm_epsilon
    x_TD = x_TD + attention(under(w, "attn."), rms_norm(x_TD, w["norm_a.gain"], epsilon), model)
    u_TD, ffn = rms_norm(x_TD, w["norm_f.gain"], epsilon), under(w, "ffn.")
    if "router.kernel" not in ffn:
        return x_TD + gated_ffn(ffn["w13.kernel"], ffn["w2.kernel"], u_TD), None
    y_TD, stats = moe(ffn, u_TD, model, valid, margins)
    return x_TD + y_TD, stats


def one_sequence(w: Weights, tokens: list[int], model: ModelConfig, margins: list[float]):
    """Logits [T, V], MTP logits [[T-k, V]] and per-layer statistics of one sequence."""
    table, head, epsilon = w["embed.table"], w["head.kernel"], model.norm_epsilon
    T, stats = len(tokens), []
    x_TD = table[tokens]
    for i in range(model.num_dense_layers):
        x_TD, _ = block(layer(w, "dense_blocks", i), x_TD, model, T, margins)
    for i in range(model.num_moe_layers):
        x_TD, load = block(layer(w, "moe_blocks", i), x_TD, model, T, margins)
        stats.append(load)
    normed_TD = rms_norm(x_TD, w["final_norm.gain"], epsilon)
    hidden_TD = normed_TD if model.mtp_hidden == "post_norm" else x_TD
    mtp_logits = []
    for k in range(1, model.mtp_depth + 1):  # spec §4; position i reads h_i and Emb(t_{i+k})
        module, kept = layer(w, "mtp", k - 1), T - k
        embedded = rms_norm(table[tokens[k:]], module["enorm.gain"], epsilon)
        previous = rms_norm(hidden_TD[:kept], module["hnorm.gain"], epsilon)
        x_TD = torch.cat([embedded, previous], dim=-1) @ module["proj.kernel"]
        x_TD, load = block(under(module, "block."), x_TD, model, kept, margins)
        stats.append(load)
        normed = rms_norm(x_TD, module["out_norm.gain"], epsilon)
        hidden_TD = normed if model.mtp_hidden == "post_norm" else x_TD
        mtp_logits.append(normed @ head)
    return normed_TD @ head, mtp_logits, stats


def forward(w: Weights, tokens_BT: list[list[int]], model: ModelConfig) -> Output:
    """The whole model over a batch of input tokens."""
    margins: list[float] = []
    logits, mtp_logits, stats = zip(
        *(one_sequence(w, tokens, model, margins) for tokens in tokens_BT), strict=True
    )
    merged = []
    for layers in zip(*stats, strict=True):  # one tuple a layer, one entry a sequence
        mean = {
            name: torch.stack([getattr(s, name) for s in layers]).mean()
            for name in ("sequence_loss", "expert_loss", "device_loss", "communication_loss")
        }
        merged.append(LayerStats(counts=sum(s.counts for s in layers), **mean))
    return Output(
        torch.stack(logits),
        [torch.stack(depth) for depth in zip(*mtp_logits, strict=True)],
        merged,
        margins,
    )


def losses(
    output: Output, tokens_BT: list[list[int]], model: ModelConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """(main, MTP without lambda) of [B, T+1] tokens; a depth has T-k terms, divided by T (§4)."""
    batch, T = len(tokens_BT), len(tokens_BT[0]) - 1
    log_main = torch.log_softmax(output.logits, dim=-1)
    main = -sum(log_main[b, i, row[i + 1]] for b, row in enumerate(tokens_BT) for i in range(T))
    mtp = torch.zeros((), dtype=log_main.dtype)
    for k, logits in enumerate(output.mtp_logits, start=1):
        log_k = torch.log_softmax(logits, dim=-1)
        for b, row in enumerate(tokens_BT):
            mtp = mtp - sum(log_k[b, i, row[i + k + 1]] for i in range(T - k))
    return main / (batch * T), mtp / (batch * T * max(model.mtp_depth, 1))
