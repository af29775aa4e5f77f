"""Serves a run of ours or a Hugging Face folder over the OpenAI API.

    python -m experiments.serve --checkpoint=runs/tiny [--port=8000] [--api_key_file=FILE]

Completions and chats at /v1, GET /health and /metrics (Prometheus) beside it. The port opens when
every program is compiled. SIGTERM: no new connections, running requests end, exit code 0. Exit
codes: 0 stopped by a signal, 1 the engine failed, 2 a mistake in the call (one line).
"""

import dataclasses
import os
import signal
import socket
from pathlib import Path

from absl import flags

from dsv3_jax.errors import UserError, run_main
from dsv3_jax.serve.requests import EngineOptions

_DEFAULT = EngineOptions()
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Working directory of a run, or a Hugging Face folder.", required=True
)
_DTYPE = flags.DEFINE_enum(
    "dtype",
    "bfloat16",
    ["float32", "bfloat16", "fp8"],
    "Of the weights and the arithmetic; fp8: FP8 weights of a folder stay as they are.",
)
_MODEL_NAME = flags.DEFINE_string("model_name", None, "Default: the checkpoint's last folder.")
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen at; 0.0.0.0: everywhere.")
_PORT = flags.DEFINE_integer("port", 8000, "0: any that is free.", lower_bound=0, upper_bound=65535)
_API_KEY_ENV = flags.DEFINE_string(
    "api_key_env", None, "Environment variable with the key that callers must send."
)
_API_KEY_FILE = flags.DEFINE_string("api_key_file", None, "File with such keys, one a line.")
_MAX_BODY_BYTES = flags.DEFINE_integer("max_body_bytes", 4 << 20, "Of a request.", lower_bound=1)
_MAX_CHOICES = flags.DEFINE_integer("max_choices", 32, "Prompts x n of a request.", lower_bound=1)
_GRACE_SECONDS = flags.DEFINE_integer(
    "grace_seconds", 30, "Running requests get this long when the server stops.", lower_bound=0
)
_DATA = flags.DEFINE_integer("data", 1, "Mesh: groups of devices with all experts.", lower_bound=1)
_EXPERT = flags.DEFINE_integer("expert", 1, "Mesh: devices that share the experts.", lower_bound=1)
_TENSOR = flags.DEFINE_integer(
    "tensor", 1, "Mesh: devices that share heads and experts, with the same rows.", lower_bound=1
)

_MAX_ROWS = flags.DEFINE_integer("max_rows", _DEFAULT.max_rows, "Requests decoded together.")
_CONTEXT_TOKENS = flags.DEFINE_integer(
    "context_tokens", _DEFAULT.context_tokens, "Prompt and output of a request, at most."
)
_PAGE_TOKENS = flags.DEFINE_integer("page_tokens", _DEFAULT.page_tokens, "Of a cache page.")
_NUM_PAGES = flags.DEFINE_integer(
    "num_pages", None, "In all; default: enough for max_rows full contexts."
)
_PREFILL_CHUNK = flags.DEFINE_integer(
    "prefill_chunk", _DEFAULT.prefill_chunk, "Prompt tokens that one step takes in."
)
_PREFILL_ROWS = flags.DEFINE_integer(
    "prefill_rows", _DEFAULT.prefill_rows, "Prompts that one step takes them of, a device."
)
_CACHE_DTYPE = flags.DEFINE_enum(
    "cache_dtype", _DEFAULT.cache_dtype, ["bfloat16", "float32", "fp8"], "Of the latent cache."
)
_NUM_DRAFT_TOKENS = flags.DEFINE_integer(
    "num_draft_tokens", _DEFAULT.num_draft_tokens, "MTP drafts verified a step; 0: none."
)
_MAX_QUEUE = flags.DEFINE_integer(
    "max_queue", _DEFAULT.max_queue, "Requests that may wait; more are answered 429.", lower_bound=1
)
_PREFIX_REUSE = flags.DEFINE_bool(
    "prefix_reuse", _DEFAULT.prefix_reuse, "Share the cache of equal beginnings of prompts."
)
_REDUNDANT_EXPERTS = flags.DEFINE_integer(
    "redundant_experts", _DEFAULT.redundant_experts, "Slots for copies of experts.", lower_bound=0
)
_REBALANCE_STEPS = flags.DEFINE_integer(
    "rebalance_steps", None, "Steps between new placements of experts; default: never.",
    lower_bound=1,
)  # fmt: skip
_LAYERS_APART = flags.DEFINE_bool(
    "layers_apart", None, "Faster on a GPU, its default; weights are there twice at the start."
)


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; write --checkpoint=DIR")
    # Mistakes are found before the weights, which take long.
    try:
        import uvicorn

        from dsv3_jax.serve.server import ServerOptions, make_app
    except ImportError as error:
        raise UserError(f"serving needs {error.name}; pip install 'dsv3-jax[serve]'") from None
    keys, listener = api_keys(), bind(_HOST.value, _PORT.value)
    from dsv3_jax.config import ParallelConfig
    from dsv3_jax.parallel.mesh import emulate_cpu_devices, make_mesh, serving_mesh

    parallel, tensor = ParallelConfig(data=_DATA.value, expert=_EXPERT.value), _TENSOR.value
    emulate_cpu_devices(dataclasses.replace(parallel, data=parallel.data * tensor))
    import jax.numpy as jnp

    from dsv3_jax.checkpoint.pretrained import load_model, load_run_tokenizer, read_model
    from dsv3_jax.data.chat import load_chat_template
    from dsv3_jax.serve.checks import check_options, check_tensor
    from dsv3_jax.serve.engine import Engine
    from dsv3_jax.serve.loop import warm_up

    options = engine_options()
    tokenizer = load_run_tokenizer(_CHECKPOINT.value)
    template = load_chat_template(_CHECKPOINT.value)
    config = read_model(_CHECKPOINT.value)
    check_options(options, config, parallel.data * parallel.expert)
    check_tensor(config, parallel.expert, tensor, fp8=_DTYPE.value == "fp8" and tensor > 1)
    tokenizer.check_fits(config.vocab_size)
    mesh = None
    if tensor > 1:
        mesh = serving_mesh(parallel, tensor)
    elif parallel.data * parallel.expert > 1:
        mesh = make_mesh(parallel)

    dtype = jnp.float8_e4m3fn if _DTYPE.value == "fp8" else jnp.dtype(_DTYPE.value)
    failed = False

    def stop() -> None:
        nonlocal failed
        failed = server.should_exit = True

    engine = Engine(load_model(_CHECKPOINT.value, dtype, mesh), options)
    warm_up(engine)
    name = _MODEL_NAME.value or Path(_CHECKPOINT.value).absolute().name
    app = make_app(
        engine,
        tokenizer,
        template,
        ServerOptions(
            model_name=name,
            context_tokens=options.context_tokens,
            vocab_size=config.vocab_size,
            api_keys=keys,
            max_body_bytes=_MAX_BODY_BYTES.value,
            max_choices=min(_MAX_CHOICES.value, _MAX_QUEUE.value),
        ),
        on_failure=stop,
    )
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            server_header=False,
            timeout_graceful_shutdown=_GRACE_SECONDS.value,
        )
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # uvicorn stops, then raises the signal again
    host, port = listener.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    listener.listen()  # who reads the next line may call
    print(f"{name} is served at http://{host}:{port}/v1", flush=True)
    server.run(sockets=[listener])
    return 1 if failed else 0


def engine_options() -> EngineOptions:
    return EngineOptions(
        max_rows=_MAX_ROWS.value,
        context_tokens=_CONTEXT_TOKENS.value,
        page_tokens=_PAGE_TOKENS.value,
        num_pages=_NUM_PAGES.value,
        prefill_chunk=_PREFILL_CHUNK.value,
        prefill_rows=_PREFILL_ROWS.value,
        cache_dtype=_CACHE_DTYPE.value,
        num_draft_tokens=_NUM_DRAFT_TOKENS.value,
        max_queue=_MAX_QUEUE.value,
        prefix_reuse=_PREFIX_REUSE.value,
        redundant_experts=_REDUNDANT_EXPERTS.value,
        rebalance_steps=_REBALANCE_STEPS.value,
        layers_apart=_LAYERS_APART.value,
    )


def api_keys() -> tuple[str, ...]:
    """The keys that callers may send; none when no flag asks for one."""
    keys = []
    if _API_KEY_ENV.value is not None:
        key = os.environ.get(_API_KEY_ENV.value, "").strip()
        if not key:
            raise UserError(f"--api_key_env={_API_KEY_ENV.value} is not set in the environment")
        keys.append(key)
    if _API_KEY_FILE.value is not None:
        try:
            lines = Path(_API_KEY_FILE.value).read_text(encoding="utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8"
            raise UserError(
                f"--api_key_file={_API_KEY_FILE.value} cannot be read: {reason}"
            ) from None
        if not lines:
            raise UserError(f"--api_key_file={_API_KEY_FILE.value} is empty; write a key into it")
        keys += lines
    return tuple(keys)


def bind(host: str, port: int) -> socket.socket:
    """The socket of the server; it listens once the server runs."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"--host={host} --port={port} cannot be used: {reason}") from None
    return listener


if __name__ == "__main__":
    run_main(main)
