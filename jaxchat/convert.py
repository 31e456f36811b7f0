"""Parameter names and layouts between the worlds, in numpy only.

The project's own form is a flat dict of float32 arrays by dotted name, matrices (out, in).
"""

from collections.abc import Mapping

import numpy as np


def check_params(params: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise one ValueError that lists every missing, extra and misshapen weight."""
    problems = [f"missing {name} {shapes[name]}" for name in sorted(shapes.keys() - params.keys())]
    problems += [f"unexpected {name}" for name in sorted(params.keys() - shapes.keys())]
    problems += [
        f"{name} has shape {tuple(params[name].shape)}, the model wants {shapes[name]}"
        for name in sorted(shapes.keys() & params.keys())
        if tuple(params[name].shape) != tuple(shapes[name])
    ]
    if problems:
        shown = "\n  ".join(problems[:20] + ["..."] * (len(problems) > 20))
        raise ValueError(f"these weights are of another model:\n  {shown}")
