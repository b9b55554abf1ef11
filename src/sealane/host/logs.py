"""The agent's log: lines on stderr, as text on a terminal and as JSON elsewhere."""

import logging
import sys
from typing import Any, Literal

import structlog


def configure_logs(form: Literal["auto", "json", "text"] = "auto", level: str = "info") -> None:
    """Set structlog up, and send the libraries' warnings the same way. QEMU's library stays silent: it logs messages."""
    is_text = form == "text" or (form == "auto" and sys.stderr.isatty())
    renderer: Any = (
        structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"], bool_as_flag=False)
        if is_text
        else structlog.processors.JSONRenderer()
    )
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(processor=renderer, foreign_pre_chain=shared))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("qemu.qmp").disabled = True
