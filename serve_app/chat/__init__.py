"""Answers of models: from a Ray Serve deployment of its own, which is there while somebody asks."""
