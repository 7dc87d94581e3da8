from typing import Any

from mae_bench.registry import load_object

API = {
    "__version__": "mae_bench.environment.provenance:VERSION",
    "create_mae": "mae_bench.models.create:create_mae",
    "load_mae": "backbones.mae:load_mae",
}


def __getattr__(name: str) -> Any:
    if name in API:
        return load_object(API[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(API)
