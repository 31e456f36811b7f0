"""What Prometheus reads: the same quantities as vLLM's, under the prefix `jaxchat:`."""

import time
from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from jaxchat.request import Event
from jaxchat.server.worker import Worker

LATENCIES_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)


class Metrics:
    """The metrics of one server, in a registry of its own."""

    def __init__(self, model_name: str, workers: Sequence[Worker]) -> None:
        self.registry = CollectorRegistry()
        self._name, self._workers = model_name, workers
        self._gauge("num_requests_running", "Replies in a slot.", self._running)
        self._gauge("num_requests_waiting", "Replies that wait for a slot.", self._waiting)
        self._gauge(
            "replicas_available",
            "Engines that take requests.",
            lambda: sum(worker.available for worker in workers),
        )
        self.registry.register(_PrefixCache(model_name, workers))
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of all requests.")
        self.generation_tokens = self._counter("generation_tokens", "Tokens of all replies.")
        self._ended = Counter(
            "jaxchat:request_success",
            "Replies by the reason for their end.",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self._answers = Counter(
            "jaxchat:http_requests",
            "Answers by path and status.",
            ["path", "status"],
            registry=self.registry,
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

    def watch(self, prompt_tokens: int) -> "Watch":
        """Start the clock of one request."""
        self.prompt_tokens.inc(prompt_tokens)
        self.prompt_length.observe(prompt_tokens)
        return Watch(self)

    def ended(self, reason: str) -> None:
        self._ended.labels(self._name, reason).inc()

    def _running(self) -> int:
        return sum(min(worker.load, worker.engine.slots) for worker in self._workers)

    def _waiting(self) -> int:
        return sum(max(0, worker.load - worker.engine.slots) for worker in self._workers)

    def _gauge(self, name: str, help: str, function: Callable[[], float]) -> None:
        gauge = Gauge(f"jaxchat:{name}", help, ["model_name"], registry=self.registry)
        gauge.labels(self._name).set_function(function)

    def _counter(self, name: str, help: str) -> Counter:
        counter = Counter(f"jaxchat:{name}", help, ["model_name"], registry=self.registry)
        return counter.labels(self._name)

    def _histogram(self, name: str, help: str, buckets: Sequence[float]) -> Histogram:
        histogram = Histogram(
            f"jaxchat:{name}", help, ["model_name"], registry=self.registry, buckets=buckets
        )
        return histogram.labels(self._name)


class _PrefixCache(Collector):
    """Counters that the engines keep."""

    def __init__(self, model_name: str, workers: Sequence[Worker]) -> None:
        self._name, self._workers = model_name, workers

    def collect(self) -> Iterator[CounterMetricFamily]:
        engines = [worker.engine for worker in self._workers]
        for name, help, value in (
            ("queries", "Tokens of all prompts.", sum(one.prompt_tokens for one in engines)),
            ("hits", "Those that the cache held.", sum(one.reused_tokens for one in engines)),
        ):
            family = CounterMetricFamily(
                f"jaxchat:prefix_cache_{name}", help, labels=["model_name"]
            )
            family.add_metric([self._name], value)
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
