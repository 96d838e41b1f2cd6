"""In what order each worker of a pipeline runs its tasks. Plain data, no JAX."""

from rhino_jax.schedule.generate import SCHEDULES, make_schedule
from rhino_jax.schedule.tasks import Schedule, Task

__all__ = ["SCHEDULES", "Schedule", "Task", "make_schedule"]
