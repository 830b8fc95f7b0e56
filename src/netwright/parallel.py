"""Independent trials over the cores of this machine (joblib), or over a Ray cluster when one is named."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from netwright.console import UserError, task

T = TypeVar("T")


def run_all(
    function: Callable[..., T],
    calls: Iterable[tuple[Any, ...]],
    *,
    jobs: int = 1,
    ray: str | None = None,
    description: str = "trials",
) -> list[T]:
    """Calls ``function(*arguments)`` for each tuple of arguments and returns the results in order.

    Args:
        function: A module-level function (it is sent to other processes when ``jobs`` is above 1).
        calls: One tuple of arguments for each trial.
        jobs: Processes at once; 1 runs in this process, -1 uses every core.
        ray: Address of a Ray cluster (``"local"`` starts one here); needs the extra ``ray``.
        description: What the progress bar says.

    Raises:
        ValueError: If ``jobs`` is 0 or below -1.
        UserError: If Ray is asked for and not installed, or does not answer at the address.

    Example:
        >>> run_all(pow, [(2, 3), (3, 2)])
        [8, 9]
    """
    if jobs == 0 or jobs < -1:
        raise ValueError(f"jobs must be >= 1, or -1 for every core, got {jobs}")
    calls = list(calls)
    results: list[T] = []
    with task(description, total=len(calls)) as bar:
        if jobs == 1 and ray is None:
            for arguments in calls:
                results.append(function(*arguments))
                bar.advance()
            return results
        import joblib

        with warnings.catch_warnings(), joblib.parallel_config(**_backend(jobs, ray)):
            # joblib replaces a process that has kept 300 MB between two trials; nothing is lost, so nothing is said
            warnings.filterwarnings("ignore", "A worker stopped while some jobs", UserWarning)
            options = {} if ray else {"return_as": "generator"}
            for result in joblib.Parallel(**options)(joblib.delayed(function)(*arguments) for arguments in calls):
                results.append(result)
                bar.advance()
    return results


def _backend(jobs: int, ray: str | None) -> dict[str, Any]:
    if ray is None:
        return {"backend": "loky", "n_jobs": jobs, "inner_max_num_threads": 1}
    try:
        import ray as ray_package
        from ray.util.joblib import register_ray
    except ImportError as error:
        raise UserError("Ray is not installed", cure='install it with: pip install "netwright[ray]"') from error
    register_ray()
    if not ray_package.is_initialized():
        try:
            ray_package.init(address=None if ray == "local" else ray, log_to_driver=False, include_dashboard=False)
        except (ConnectionError, ValueError) as error:
            raise UserError(f"no Ray cluster answers: {error}", where=ray, cure="check --ray ADDRESS") from error
    return {"backend": "ray", "n_jobs": jobs if jobs > 1 else -1}
