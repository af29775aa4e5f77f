"""After the warm-up nothing is compiled any more, whatever is asked."""

import jax
import jax.monitoring
import pytest
from flax import nnx
from small_engine import CONTEXT, OPTIONS, make_model

from dsv3_jax.serve.engine import Engine
from dsv3_jax.serve.loop import warm_up
from dsv3_jax.serve.requests import Request, Sampling


@pytest.fixture
def compiled():
    """Names of programs as XLA gets them."""
    names = []

    def listen(event, seconds, **details):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(details.get("fun_name"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.slow
@pytest.mark.parametrize("loaded", [False, True])
def test_nothing_is_compiled_after_the_warm_up(compiled, loaded):
    model = make_model()
    if loaded:  # weights bound to their device, as from a checkpoint
        graphdef, state = nnx.split(model)
        model = nnx.merge(graphdef, jax.device_put(state, jax.devices()[0]))
    engine = Engine(model, OPTIONS)
    warm_up(engine)
    assert compiled and not engine.has_work
    del compiled[:]
    sampled = Sampling(
        top_p=0.5, top_k=3, min_p=0.1, repetition_penalty=1.2, logit_bias=((1, 2.0),)
    )
    prompts = (tuple(range(20)), tuple(range(20)), (1,), (5, 6, 7))
    numbers = [
        engine.submit(
            Request(
                prompt=prompt,
                max_tokens=CONTEXT - len(prompt),
                sampling=sampled if len(prompt) > 3 else Sampling(presence_penalty=0.5),
                num_logprobs=5 if len(prompt) == 3 else None,
            )
        )
        for prompt in prompts * 3
    ]
    engine.step()
    engine.cancel(numbers[1])
    while engine.has_work:
        engine.step()
    engine.statistics()
    assert not compiled
