"""Choosing an implementation by name, or the first that accepts the operands.

An implementation refuses operands by raising NotImplementedError with the reason, before it emits
anything; a choice that ends with nobody reports every reason.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax

# What `implementation=None` tries, in this order, on each platform. 'reference' is the definition.
ORDER = {
    "gpu": ("hopper", "xla", "reference"),
    "tpu": ("tpu", "xla", "reference"),
    "cpu": ("xla", "reference"),
}


def call(
    operation: str,
    implementations: Mapping[str, Callable[..., Any]],
    implementation: str | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Runs `operation` by the implementation named, or by the first that accepts the operands.

    Raises:
      ValueError: no implementation has that name.
      NotImplementedError: nobody accepts the operands; the text lists every reason.
    """
    if implementation is not None and implementation not in implementations:
        raise ValueError(
            f"{operation} has no implementation {implementation!r}; "
            f"allowed: {', '.join(implementations)}"
        )
    if implementation is not None:
        names = (implementation,)
    else:
        names = [n for n in ORDER[_platform()] if n in implementations]
    reasons = []
    for name in names:
        try:
            with jax.named_scope(operation):  # by which profiles and programs show a kernel
                return implementations[name](*args, **kwargs)
        except NotImplementedError as reason:
            reasons.append(f"{name}: {reason}")
    raise NotImplementedError(f"{operation} takes no such operands; " + "; ".join(reasons))


def _platform() -> str:
    """Where the program being traced will run: `jax.default_device` is obeyed."""
    device = jax.config.jax_default_device
    if device is None:
        return jax.default_backend()
    if isinstance(device, str):
        device = jax.local_devices(backend=device)[0]
    return device.platform
