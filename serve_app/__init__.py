"""The door: HTTP in front of the event log. `app` is the Ray Serve application."""


def __getattr__(name: str) -> object:
    """`app` is bound when it is asked for: `python -m serve_app.local` has no use for it."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from serve_app.deployment import app

    return app
