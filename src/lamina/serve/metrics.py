"""What Prometheus may read of the server."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

LATENCY = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
COMPLETION = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 150.0, 300.0)
"""For language models."""
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """The server's own registry, so that two servers in one process do not share their counts. language: of a language
    model, whose requests take longer."""

    def __init__(self, *, language: bool = False) -> None:
        latency = COMPLETION if language else LATENCY
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "lamina_requests", "Requests, by route and status.", ["route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "lamina_request_seconds", "Seconds of a request.", ["route"], buckets=latency, registry=self.registry
        )
        self.first = Histogram(
            "lamina_first_token_seconds",
            "Seconds from a prompt's place in the queue to its first token.",
            buckets=COMPLETION,
            registry=self.registry,
        )
        self.refusals = Counter(
            "lamina_refusals", "Refused requests, by what was wrong.", ["reason"], registry=self.registry
        )
        self.predictions = Counter(
            "lamina_predictions", "Images, texts or prompts that were predicted.", registry=self.registry
        )
        self.tokens = Counter(
            "lamina_tokens", "Tokens of prompts and of completions.", ["kind"], registry=self.registry
        )
        self.batches = Histogram(
            "lamina_batch_inputs",
            "Images, texts or prompts that were computed together.",
            buckets=BATCHES,
            registry=self.registry,
        )
        self.queue = Gauge(
            "lamina_queue_inputs",
            "Images, texts or prompts that are being decoded, wait or are computed.",
            registry=self.registry,
        )
        self.held = Gauge("lamina_body_bytes", "Bytes of request bodies in memory.", registry=self.registry)
        self.version = Gauge("lamina_model_version", "Version of the model that is served.", registry=self.registry)
        self.refused_versions = Gauge(
            "lamina_refused_versions", "Versions that failed to load or to pass the check.", registry=self.registry
        )

    def text(self) -> bytes:
        return generate_latest(self.registry)
