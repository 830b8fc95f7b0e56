"""A latency table corrected by whole networks.

Times read inside a network carry the clock's own share, and what lies between two operations belongs to none of them.
So the latency y_n of whole random networks is explained by the table t with few free numbers and many stiff ones,

    y_n = c + sum_{o in n} (h + (s + u_o) t_o),

where c, h (the overhead of a call) and s (the stretch of the clock) are free, and the corrections u_o of single
operations are held to 0 by ridge regression on relative errors. The ridge is chosen by leave-one-out cross-validation.
The table that comes out is a sum as before: every search takes it as it is.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np

# The free columns are so much longer than the stiff ones that the ridge does not feel them.
FREE = 1e3
RIDGES = np.logspace(-4, 2, 13)
LEAST = 0.1  # of its time in the table is left to an operation, whatever few and noisy calls say


def calibrate(
    table: Mapping[Hashable, float],
    constant: float,
    networks: Sequence[Sequence[Hashable]],
    milliseconds: Sequence[float],
) -> tuple[dict[Hashable, float], float]:
    """The table and its constant, corrected.

    Args:
        table: Milliseconds of every operation, by key.
        constant: Milliseconds of the rest of a network.
        networks: The keys of the operations of each network, as often as it has them.
        milliseconds: Of a whole call of each network.

    Returns:
        The same keys with corrected times, none below a tenth of what it was, and the corrected constant.

    Raises:
        ValueError: If there are fewer than two networks or not as many times, a time is not positive, or a network has
            an operation that the table lacks.

    Example:
        >>> table, constant = calibrate({"a": 1.0, "b": 2.0}, 0.0, [["a"], ["b"], ["a", "b"], ["b", "b"]], [2, 3, 4, 5])
        >>> round(constant, 3), {name: round(ms, 3) for name, ms in table.items()}
        (1.0, {'a': 1.0, 'b': 2.0})
    """
    from sklearn.linear_model import RidgeCV

    if len(networks) < 2 or len(networks) != len(milliseconds):
        raise ValueError(
            f"networks must be >= 2 with one time each, got {len(networks)} with {len(milliseconds)} times"
        )
    y = np.asarray(milliseconds, dtype=np.float64)
    if not (y > 0).all():
        raise ValueError(f"milliseconds must be > 0, got {y.min()}")
    place = {key: i for i, key in enumerate(table)}
    counts = np.zeros((len(networks), len(place)))
    for row, keys in zip(counts, networks, strict=True):
        for key in keys:
            if key not in place:
                raise ValueError(f"networks must hold operations of the table, got {key!r}")
            row[place[key]] += 1
    times = np.fromiter(table.values(), dtype=np.float64)
    usual = float(times.mean()) or 1.0
    parts = counts * times
    free = np.column_stack([np.full(len(y), y.mean()), counts.sum(1) * usual, parts.sum(1)])
    ridge = RidgeCV(alphas=RIDGES, fit_intercept=False)
    ridge.fit(np.column_stack([FREE * free, parts]) / y[:, None], (y - constant - parts.sum(1)) / y)
    more, overhead, stretch = FREE * ridge.coef_[:3]
    corrected = times * (1 + stretch + ridge.coef_[3:]) + overhead * usual
    rest = max(0.0, float(constant + more * y.mean()))
    return dict(zip(table, np.maximum(corrected, LEAST * times).tolist(), strict=True)), rest
