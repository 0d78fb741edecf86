"""The HTTP API. `app` is the Ray Serve application."""


def __getattr__(name: str) -> object:
    """Binds `app` on first use: `python -m serve_app.local` doesn't need it."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from serve_app.deployment import app

    return app
