"""The smallest run of ``netwright design`` that has every part; several test files share one."""

TINY = {
    "search_epochs": 3,
    "search_channels": 2,
    "channels": 4,
    "epochs": 4,
    "baseline": "small_convnet",
    "space": "micro-darts-2-shared",
    "sparsity": 0.8,
    "seed": 1,
}
ARGUMENTS = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
