"""What a server did and does, as Prometheus reads it."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter

from mlxchat import __version__
from mlxchat.serve.worker import Worker

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
TEXT = "text/plain; version=0.0.4; charset=utf-8"


class Histogram:
    """How often something took how many seconds."""

    def __init__(self) -> None:
        """Begin empty."""
        self.counts = [0] * (len(_SECONDS) + 1)
        self.total = 0.0

    def add(self, seconds: float) -> None:
        """Count one."""
        self.counts[bisect_left(_SECONDS, seconds)] += 1
        self.total += seconds

    def lines(self, name: str) -> list[str]:
        """Return it in Prometheus' text format."""
        found, below = [], 0
        for bound, count in zip((*map(str, _SECONDS), "+Inf"), self.counts, strict=True):
            below += count
            found.append(f'{name}_bucket{{le="{bound}"}} {below}')
        return [*found, f"{name}_sum {self.total:.6f}", f"{name}_count {below}"]


class Metrics:
    """Counters of one server."""

    def __init__(self) -> None:
        """Begin at nothing."""
        self.requests: Counter[tuple[str, int]] = Counter()
        self.finished: Counter[str] = Counter()
        self.prompt_tokens = 0
        self.first_token, self.whole = Histogram(), Histogram()

    def text(self, worker: Worker) -> str:
        """Return everything, with what the worker is at."""
        lines: list[str] = []

        def add(name: str, kind: str, help_: str, *values: str) -> None:
            lines.extend([f"# HELP mlxchat_{name} {help_}", f"# TYPE mlxchat_{name} {kind}", *values])

        def number(name: str, kind: str, help_: str, value: float) -> None:
            add(
                name,
                kind,
                help_,
                f"mlxchat_{name} {value:g}" if isinstance(value, float) else f"mlxchat_{name} {value}",
            )

        add(
            "requests_total", "counter", "Answered requests by route and status.",
            *(f'mlxchat_requests_total{{route="{route}",status="{status}"}} {count}'
              for (route, status), count in sorted(self.requests.items())),
        )  # fmt: skip
        add(
            "choices_total", "counter", "Choices that ended, by why.",
            *(f'mlxchat_choices_total{{reason="{reason}"}} {count}' for reason, count in sorted(self.finished.items())),
        )  # fmt: skip
        number("prompt_tokens_total", "counter", "Tokens of prompts.", self.prompt_tokens)
        number("generated_tokens_total", "counter", "Tokens that were sampled.", worker.tokens_generated)
        number("failures_total", "counter", "Answers whose computation failed.", worker.failures)
        number(
            "reused_prompt_tokens_total", "counter", "Tokens of prompts that were not read again.", worker.num_reused
        )
        number("rows_running", "gauge", "Choices that are computed.", worker.num_running)
        number("rows_waiting", "gauge", "Choices that wait for a row.", worker.num_waiting)
        number("models_loaded", "gauge", "Models in memory.", len(worker.loaded))
        number("step_seconds", "gauge", "Time of one token of every row, lately.", float(worker.step_seconds))
        add("time_to_first_token_seconds", "histogram", "From a request to its first token.",
            *self.first_token.lines("mlxchat_time_to_first_token_seconds"))  # fmt: skip
        add("answer_seconds", "histogram", "From a request to the end of its answer.",
            *self.whole.lines("mlxchat_answer_seconds"))  # fmt: skip
        add("info", "gauge", "Of what is served.", f'mlxchat_info{{version="{__version__}"}} 1')
        return "\n".join([*lines, *_process_lines()]) + "\n"


def _process_lines() -> list[str]:
    """Return what every Prometheus client tells of its process, under the names that dashboards know."""
    import psutil

    process = psutil.Process()
    with process.oneshot():
        times = process.cpu_times()
        found = [
            ("cpu_seconds_total", "counter", "Processor time.", times.user + times.system),
            ("resident_memory_bytes", "gauge", "Memory in use.", process.memory_info().rss),
            ("start_time_seconds", "gauge", "When the process began, Unix time.", process.create_time()),
            ("open_fds", "gauge", "Open files and connections.", process.num_fds()),
        ]
    return [
        line
        for name, kind, help_, value in found
        for line in (f"# HELP process_{name} {help_}", f"# TYPE process_{name} {kind}", f"process_{name} {value}")
    ]


def resident_bytes() -> int:
    """Return the memory that this process holds."""
    import psutil

    return int(psutil.Process().memory_info().rss)
