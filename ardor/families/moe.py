"""What families with experts share: how a config.json tells of them, and where files hold them."""

from typing import Any

from ardor.arch.spec import Experts, Mlp, Router
from ardor.errors import ConfigError
from ardor.families.hf_config import HFConfig
from ardor.families.names import AllExperts, Apart, PerExpert, Table


def read_experts(
    hf: HFConfig,
    expert: Mlp,
    *,
    count: int,
    per_token: int,
    shared: Mlp | None = None,
    shared_gated: bool = False,
    **router: Any,
) -> Experts:
    """Experts of one shape; `count` and `per_token` are the family's defaults.

    Their number has two names, of which transformers reads and writes both.

    Raises: ConfigError if the two differ, or a token reads more experts than there are.
    """
    found = {key: hf.count(key, count) for key in _COUNTS if hf.take(key, None) is not None}
    if len({*found.values()}) > 1:
        raise ConfigError(f"{hf.path}: {found} disagree; remove the one that is wrong")
    count = next(iter(found.values()), count)
    per_token = hf.count("num_experts_per_tok", per_token)
    if per_token > count:
        raise ConfigError(f"{hf.path}: num_experts_per_tok={per_token} of only {count} experts")
    return Experts(
        count=count,
        expert=expert,
        router=Router(per_token=per_token, **router),
        shared=shared,
        shared_gated=shared_gated,
    )


_COUNTS = ("num_local_experts", "num_experts")


def read_balance(hf: HFConfig, default: float = 0.001) -> float:
    """The weight of the load-balancing loss, which acts in training alone."""
    hf.take("output_router_logits", False)  # chooses what a Python call of transformers returns
    return hf.number("router_aux_loss_coef", default)


def expert_places(each: str, gate: str, up: str, down: str, stacked: str = "mlp.experts") -> Table:
    """Where files hold the experts: one by one under `each` ({} is the number), as published; or
    all in one tensor, as transformers has them in memory since its version 5."""
    one = {name: PerExpert(f"{each}.{name}") for name in (gate, up, down)}
    return {
        ("ffn.experts.gate_proj", "ffn.experts.up_proj"): (
            Apart((one[gate], one[up])),
            AllExperts(f"{stacked}.gate_up_proj"),
        ),
        "ffn.experts.down_proj": (one[down], AllExperts(f"{stacked}.down_proj")),
    }
