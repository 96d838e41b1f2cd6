"""The small programs of published expert plans, as train steps for one device."""
