"""The door: HTTP in front of the event log. `app` is the Ray Serve application."""

from typing import Any


def __getattr__(name: str) -> Any:  # noqa: ANN401 -- whatever Serve makes of an application
    """`app` is bound when it is asked for: `python -m serve_app.local` has no use for it."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from serve_app.deployment import app

    return app
