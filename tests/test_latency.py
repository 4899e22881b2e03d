"""Latency: every model is called in turn and gets a positive number; no time is asserted."""

from types import SimpleNamespace

import jax
from test_checkpoint import place

from distilbert_jax.benchmark import latency
from distilbert_jax.models.encoder import graphdef


def test_every_model_is_timed_in_turn(tiny_model, monkeypatch):
    monkeypatch.setattr(latency, "REPEATS", 3)
    clock = iter(2.0 ** i for i in range(100))
    monkeypatch.setattr(latency, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    models = {}
    for name, layers in (("teacher", 2), ("student", 1)):
        config, params = tiny_model(num_hidden_layers=layers)
        models[name] = graphdef(config, "float32"), params
    if jax.device_count() == 8:  # as training leaves them
        models["student"] = models["student"][0], place(models["student"][1], "4x2")
    # The first call of each is a warm-up, which reads the clock once, at i = 0 and 1. A later one
    # takes from 2**i to 2**(i + 1): i = 2, 6, 10 for the first model, 4, 8, 12 for the second.
    assert latency.latencies(models, 8) == {"teacher": 1e3 * 2**6, "student": 1e3 * 2**8}
