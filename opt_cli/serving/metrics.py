"""Figures of a server, in Prometheus' format."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from opt_core.serving.scheduler import Event, Scheduler

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The figures of one server, whatever else the process counts."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry, model = self.registry, ["model"]
        self.requests = Counter(
            "opt_requests", "Requests answered", ["path", "status"], registry=registry
        )
        self.queue = Gauge("opt_queue_rows", "Rows that wait for a slot", model, registry=registry)
        self.slots = Gauge(
            "opt_slots", "Rows that can be written at a time", model, registry=registry
        )
        self.slots_used = Gauge("opt_slots_used", "Rows that have a slot", model, registry=registry)
        self.tokens = Counter("opt_generated_tokens", "Tokens written", model, registry=registry)
        self.rate = Gauge(
            "opt_tokens_per_second",
            "Tokens of the last step that made any, by its time",
            model,
            registry=registry,
        )
        self.first_token = Histogram(
            "opt_time_to_first_token_seconds", "From a request to its first token", model,
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip

    def note_step(
        self, model: str, scheduler: Scheduler, events: list[Event], seconds: float
    ) -> None:
        """Takes the figures of one step of a model's scheduler, and how long it took."""
        made = sum(event.token is not None for event in events)
        self.queue.labels(model).set(len(scheduler.waiting))
        self.slots.labels(model).set(scheduler.engine.slots)
        self.slots_used.labels(model).set(sum(row is not None for row in scheduler.rows))
        self.tokens.labels(model).inc(made)
        if made:
            self.rate.labels(model).set(made / max(seconds, 1e-9))

    def text(self) -> bytes:
        """All figures."""
        return generate_latest(self.registry)
