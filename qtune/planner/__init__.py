"""Planning: what a run will take, found by running it on meta."""

from .plan import Plan as Plan
from .plan import plan as plan
