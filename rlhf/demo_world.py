"""Old name of `rlhf.demo.world`: saved configurations hold `python:rlhf.demo_world.rows`."""
