"""Settings for every test: hypothesis draws the same cases each time, without a clock to race."""

from hypothesis import settings

settings.register_profile("shoal", deadline=None, derandomize=True, database=None)
settings.load_profile("shoal")
