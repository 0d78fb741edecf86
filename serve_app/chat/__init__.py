"""The Ray Serve deployment that answers questions to models. It has no replica while nobody asks."""
