"""Routed experts in plain numpy float64, token by token: the value and every derivative."""

import numpy as np


def routed_experts(x_XD, ids_XK, weights_XK, w13_ED2F, w2_EFD, dy_XD):
    """y = sum_k weight_k W2_k (silu(W1_k x) * W3_k x), and its derivatives against dy.

    Returns:
      y_XD and (dx_XD, dweights_XK, dw13_ED2F, dw2_EFD).
    """
    x_XD, weights_XK, w13_ED2F, w2_EFD, dy_XD = (
        np.asarray(a, np.float64) for a in (x_XD, weights_XK, w13_ED2F, w2_EFD, dy_XD)
    )
    y_XD, dx_XD, dweights_XK = map(np.zeros_like, (x_XD, x_XD, weights_XK))
    dw13_ED2F, dw2_EFD = map(np.zeros_like, (w13_ED2F, w2_EFD))
    for token, experts in enumerate(np.asarray(ids_XK)):
        x, dy = x_XD[token], dy_XD[token]
        for choice, expert in enumerate(experts):
            if expert >= len(w2_EFD):
                continue
            weight = weights_XK[token, choice]
            gate, up = np.split(x @ w13_ED2F[expert], 2)
            sigmoid = 1 / (1 + np.exp(-gate))
            product = gate * sigmoid * up
            y_XD[token] += weight * product @ w2_EFD[expert]
            dproduct = w2_EFD[expert] @ dy
            dweights_XK[token, choice] = product @ dproduct
            dw2_EFD[expert] += weight * np.outer(product, dy)
            dgate = dproduct * up * sigmoid * (1 + gate * (1 - sigmoid))
            dh = weight * np.concatenate([dgate, dproduct * gate * sigmoid])
            dw13_ED2F[expert] += np.outer(x, dh)
            dx_XD[token] += w13_ED2F[expert] @ dh
    return y_XD, (dx_XD, dweights_XK, dw13_ED2F, dw2_EFD)


def choices(rng, num_tokens, num_experts, top_k, pattern):
    """ids_XK, different within a row, drawn by a pattern of load."""
    if pattern == "one_expert":  # the first choice of every token is the last expert
        others = [rng.permutation(num_experts - 1)[: top_k - 1] for _ in range(num_tokens)]
        return np.array([[num_experts - 1, *row] for row in others], np.int32)
    allowed = num_experts if pattern == "any" else num_experts - 3  # 'idle': the last 3 get none
    return np.array([rng.permutation(allowed)[:top_k] for _ in range(num_tokens)], np.int32)


def relative_error(actual, expected):
    """Largest difference over the largest expected magnitude."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    assert np.abs(expected).max() > 0, "a comparison with zeros shows nothing"
    return np.abs(actual - expected).max() / np.abs(expected).max()
