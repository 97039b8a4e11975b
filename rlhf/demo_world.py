"""Old name of `rlhf.demo.world`: saved configurations hold `python:rlhf.demo_world.rows`."""

from rlhf.demo.world import *  # noqa: F403
