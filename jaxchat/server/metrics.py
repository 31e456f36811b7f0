"""What Prometheus reads: the same quantities as vLLM's, under the prefix `jaxchat:`."""

import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from jaxchat.request import Event
from jaxchat.server.worker import Worker

F = TypeVar("F", Gauge, Counter)

LATENCIES_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)


class Families:
    """What one server measures, in a registry of its own; each model has a line in each."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # memory, time, files: nothing without /proc
        self.running = self._family(Gauge, "num_requests_running", "Replies in a slot.")
        self.waiting = self._family(Gauge, "num_requests_waiting", "Replies that wait for a slot.")
        self.available = self._family(Gauge, "replicas_available", "Engines that take requests.")
        self.prefix_cache = _PrefixCache()
        self.registry.register(self.prefix_cache)
        self.prompt_tokens = self._family(
            Counter, "prompt_tokens", "Prompt tokens of all requests."
        )
        self.generation_tokens = self._family(
            Counter, "generation_tokens", "Tokens of all replies."
        )
        self.ended = self._family(
            Counter, "request_success", "Replies by the reason for their end.",
            labels=("model_name", "finished_reason"),
        )  # fmt: skip
        self._answers = self._family(
            Counter, "http_requests", "Answers by path and status.", labels=("path", "status")
        )
        self.first_token_s = self._histogram(
            "time_to_first_token_seconds", "From the request to its first token.", LATENCIES_S
        )
        self.inter_token_s = self._histogram(
            "inter_token_latency_seconds", "Between two tokens of a reply.", LATENCIES_S
        )
        self.whole_s = self._histogram(
            "e2e_request_latency_seconds", "From the request to the end of its reply.", LATENCIES_S
        )
        self.prompt_length = self._histogram("request_prompt_tokens", "Tokens of a prompt.", TOKENS)
        self.reply_length = self._histogram(
            "request_generation_tokens", "Tokens of a reply.", TOKENS
        )

    def text(self) -> bytes:
        """The exposition format, version 0.0.4."""
        return generate_latest(self.registry)

    def answered(self, path: str, status: int) -> None:
        self._answers.labels(path, str(status)).inc()

    def _family(
        self, kind: type[F], name: str, help: str, labels: Sequence[str] = ("model_name",)
    ) -> F:
        return kind(f"jaxchat:{name}", help, labels, registry=self.registry)

    def _histogram(self, name: str, help: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(
            f"jaxchat:{name}", help, ["model_name"], registry=self.registry, buckets=buckets
        )


class Metrics:
    """The metrics of one model: its lines in the families of the server."""

    def __init__(self, families: Families, model_name: str, workers: Sequence[Worker]) -> None:
        self._families, self._name = families, model_name
        families.running.labels(model_name).set_function(
            lambda: sum(min(worker.load, worker.engine.slots) for worker in workers)
        )
        families.waiting.labels(model_name).set_function(
            lambda: sum(max(0, worker.load - worker.engine.slots) for worker in workers)
        )
        families.available.labels(model_name).set_function(
            lambda: sum(worker.available for worker in workers)
        )
        families.prefix_cache.workers[model_name] = workers
        self.prompt_tokens = families.prompt_tokens.labels(model_name)
        self.generation_tokens = families.generation_tokens.labels(model_name)
        self.first_token_s = families.first_token_s.labels(model_name)
        self.inter_token_s = families.inter_token_s.labels(model_name)
        self.whole_s = families.whole_s.labels(model_name)
        self.prompt_length = families.prompt_length.labels(model_name)
        self.reply_length = families.reply_length.labels(model_name)

    def text(self) -> bytes:
        """The exposition format of all families."""
        return self._families.text()

    def watch(self, prompt_tokens: int) -> "Watch":
        """Start the clock of one request."""
        self.prompt_tokens.inc(prompt_tokens)
        self.prompt_length.observe(prompt_tokens)
        return Watch(self)

    def ended(self, reason: str) -> None:
        self._families.ended.labels(self._name, reason).inc()


class _PrefixCache(Collector):
    """Counters that the engines keep."""

    def __init__(self) -> None:
        self.workers: dict[str, Sequence[Worker]] = {}
        """Of each model."""

    def collect(self) -> Iterator[CounterMetricFamily]:
        for name, help, count in (
            ("queries", "Tokens of all prompts.", lambda engine: engine.prompt_tokens),
            ("hits", "Those that the cache held.", lambda engine: engine.reused_tokens),
        ):
            family = CounterMetricFamily(
                f"jaxchat:prefix_cache_{name}", help, labels=["model_name"]
            )
            for model_name, workers in self.workers.items():
                family.add_metric([model_name], sum(count(worker.engine) for worker in workers))
            yield family


class Watch:
    """The clock of one request, which may have several samples."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics, self._start = metrics, time.perf_counter()
        self._newest: dict[int, float] = {}
        """When each sample got its newest tokens."""
        self._counts: dict[int, int] = {}

    def saw(self, batch: Sequence[Event]) -> None:
        """Take in the events of one step."""
        now, metrics = time.perf_counter(), self._metrics
        fresh: dict[int, int] = {}
        for event in batch:
            if event.token is not None or event.stop_id is not None:
                fresh[event.row] = fresh.get(event.row, 0) + 1
        for row, count in fresh.items():
            metrics.generation_tokens.inc(count)
            self._counts[row] = self._counts.get(row, 0) + count
            if row in self._newest:
                for _ in range(count):
                    metrics.inter_token_s.observe((now - self._newest[row]) / count)
            elif not self._newest:
                metrics.first_token_s.observe(now - self._start)
            self._newest[row] = now
        for event in batch:
            if event.finish_reason:
                metrics.ended(event.finish_reason)
                metrics.reply_length.observe(self._counts.get(event.row, 0))
                metrics.whole_s.observe(now - self._start)
