"""Synthetic checkpoints: the published files' names, shapes, shards and sizes; random codes.

    plan("config-i").write("/data/config-i")          # 15.65 GB

For benchmarks and tests: the text such a model writes is noise, the bytes it reads are not.
"""

from .plan import FORMATS, Plan, plan
from .shape import PRESETS, TINY, Shape, VisionShape

__all__ = ["FORMATS", "PRESETS", "TINY", "Plan", "Shape", "VisionShape", "plan"]
