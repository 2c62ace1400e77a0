"""Figures of the service for Prometheus, which asks for them at /metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Figures of one service, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Histogram(
            "recformer_request_seconds",
            "Time from the head of a request to the end of its answer.",
            ("method", "route", "status"),
            buckets=SECONDS,
            registry=registry,
        )
        self.batches = Histogram(
            "recformer_batch_size",
            "Histories answered in one batch.",
            ("model",),
            buckets=SIZES,
            registry=registry,
        )
        self.computing = Histogram(
            "recformer_batch_seconds",
            "Time of a batch: reading its histories, ranking the catalogue.",
            ("model",),
            buckets=SECONDS,
            registry=registry,
        )
        self.catalogue = Gauge(
            "recformer_catalogue_items", "Items of the catalogue.", ("model",), registry=registry
        )
        self.fallbacks = Counter(
            "recformer_fallbacks",
            "Histories of which nothing was known, by what was offered instead.",
            ("model", "kind"),
            registry=registry,
        )
        self.feedback = Counter("recformer_feedback", "Feedback taken in.", registry=registry)
        self.reloads = Counter(
            "recformer_reloads", "Models loaded anew, by outcome.", ("outcome",), registry=registry
        )

    def text(self) -> bytes:
        """All of them in Prometheus' text form."""
        return generate_latest(self.registry)
